"""Streaming tensors into safetensors files as Hugging Face reads them."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import CheckpointError
from pipeline.export.entry import Entry
from pipeline.export.safetensors_file import PlannedFile, index_of, plan_files, write_file
from tests.unit.pipeline.disk import full_disk

MEBI = 2**20


def tensors(count: int, numbers: int = 256) -> dict[str, torch.Tensor]:
    """1 KiB each by default."""
    return {f"layer.{at}.weight": torch.full((numbers,), float(at)) for at in range(count)}


def entries(given: Mapping[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, tuple(value.shape), value.dtype, lambda value=value: value) for name, value in given.items()]


def write(given: Mapping[str, torch.Tensor], folder: Path, max_bytes: int, stem: str = "model") -> list[PlannedFile]:
    files = plan_files(entries(given), max_bytes, stem)
    for file in files:
        write_file(folder / file.name, file)
    return files


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    given = {**tensors(2), "steps": torch.tensor([7]), "turned": torch.arange(6.0).view(2, 3).T, "one": torch.tensor(3)}
    given |= {"none": torch.zeros(0, 4), "mask": torch.tensor([True, False, True])}
    (planned,) = write(given, tmp_path, MEBI)
    file = tmp_path / "model.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [file.name] and planned.size == file.stat().st_size
    assert index_of([planned]) is None
    found = load_file(file)
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}, "transformers refuses files without it"
    assert file.stat().st_mode & 0o777 == 0o644, "readable by the group, as other exports"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_every_type_has_the_bytes_that_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    given = {"a": torch.arange(7).to(dtype), "b": torch.tensor([True])}
    write(given, tmp_path, MEBI)
    save_file(given, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_floats_are_cast_on_the_way(tmp_path: Path) -> None:
    value = torch.randn(5 * MEBI)  # more than one piece
    (planned,) = plan_files([Entry("w", (5 * MEBI,), torch.bfloat16, lambda: value)], 1 << 40)
    digest = write_file(tmp_path / planned.name, planned)
    assert torch.equal(load_file(tmp_path / planned.name)["w"], value.bfloat16())
    assert digest == hashlib.sha256((tmp_path / planned.name).read_bytes()).hexdigest()


def test_a_large_model_is_numbered_files_and_an_index(tmp_path: Path) -> None:
    given = tensors(5)
    files = write(given, tmp_path, 2048)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    index = index_of(files)
    assert index is not None and index["metadata"] == {"total_size": 5 * 1024}
    assert list(index["weight_map"].values()) == [names[0], names[0], names[1], names[1], names[2]]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], given[name])


def test_a_tensor_larger_than_a_file_gets_its_own(tmp_path: Path) -> None:
    given = {"a": torch.zeros(10), "wide": torch.zeros(1000), "b": torch.zeros(10)}
    write(given, tmp_path, 100, stem="heads")
    assert [list(load_file(path)) for path in sorted(tmp_path.glob("heads-*.safetensors"))] == [["a"], ["wide"], ["b"]]


def test_no_tensor_at_all_is_an_empty_file(tmp_path: Path) -> None:
    write({}, tmp_path, MEBI)
    assert load_file(tmp_path / "model.safetensors") == {}


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def read() -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(256)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    (planned,) = plan_files([Entry(f"layer.{at}", (256,), torch.float32, read) for at in range(12)], MEBI)
    write_file(tmp_path / planned.name, planned)
    assert len(alive) == 12 and most == 1


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    with full_disk(10_000), pytest.raises(OSError, match=r"while writing model\.safetensors: .*File too large"):
        write({"a": torch.zeros(10_000)}, tmp_path, MEBI)


def test_a_tensor_that_changed_its_shape(tmp_path: Path) -> None:
    (planned,) = plan_files([Entry("w", (2, 2), torch.float32, lambda: torch.zeros(3))], MEBI)
    message = r"w has shape \(3,\), expected \(2, 2\); where it is read from changed while the export ran: start it"
    with pytest.raises(CheckpointError, match=message):
        write_file(tmp_path / planned.name, planned)


def test_a_type_that_the_format_does_not_have(tmp_path: Path) -> None:
    value = torch.zeros(2, dtype=torch.complex64)
    message = r"phase is torch\.complex64, which safetensors files do not hold; export a model without it"
    with pytest.raises(CheckpointError, match=message):
        write({"phase": value}, tmp_path, MEBI)
