"""Streaming tensors into safetensors files as Hugging Face reads them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.engine import zero
from pipeline.export import gather
from tests.unit.pipeline.disk import full_disk
from tests.unit.pipeline.export.runs import finished_run, recipe_of

MEBI = 2**20


def tensors(count: int, numbers: int = 256) -> dict[str, torch.Tensor]:
    """1 KiB each by default."""
    return {f"layer.{at}.weight": torch.full((numbers,), float(at)) for at in range(count)}


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    given = {**tensors(2), "steps": torch.tensor([7]), "turned": torch.arange(6.0).view(2, 3).T}
    assert gather.write_safetensors(iter(given.items()), tmp_path, MEBI) == list(given)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "transformers refuses files without it"
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644, "readable by the group, as other exports"


def test_a_large_model_is_shards_and_an_index(tmp_path: Path) -> None:
    given = tensors(5)
    assert gather.write_safetensors(iter(given.items()), tmp_path, 2048) == list(given)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 1024}
    assert list(index["weight_map"].values()) == [names[0], names[0], names[1], names[1], names[2]]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], given[name])


def test_transformers_reads_the_shards(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    gather.write_safetensors(iter(model.state_dict().items()), tmp_path, 3000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    given = {"a": torch.zeros(10), "wide": torch.zeros(1000), "b": torch.zeros(10)}
    gather.write_safetensors(iter(given.items()), tmp_path, 100, stem="heads")
    assert [list(load_file(path)) for path in sorted(tmp_path.glob("heads-*.safetensors"))] == [["a"], ["wide"], ["b"]]


def test_no_tensor_at_all_is_an_empty_file(tmp_path: Path) -> None:
    assert gather.write_safetensors(iter(()), tmp_path, MEBI) == []
    assert load_file(tmp_path / "model.safetensors") == {}


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name in (f"layer.{at}" for at in range(12)):
            tensor = torch.zeros(256)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield name, tensor
            del tensor

    gather.write_safetensors(stream(), tmp_path, 3 * 1024)
    assert len(list(tmp_path.glob("model-*"))) == 4
    assert most <= 4, "the three of a shard and the one being read"


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    message = r"while writing \.model-00000\.part: .*File too large"
    with full_disk(10_000), pytest.raises(OSError, match=message):
        gather.write_safetensors(iter({"a": torch.zeros(10_000)}.items()), tmp_path, MEBI)


def test_floats_are_cast_and_counters_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = {"weight": torch.ones(2, 2).T, "count": torch.tensor([3])}
    asked = []

    def state(folder: Path, tag: str) -> dict[str, torch.Tensor]:
        asked.append((folder, tag))
        return lazy

    monkeypatch.setattr(zero, "fp32_state", state)
    checkpoint = finished_run(tmp_path, recipe_of("continued_pretraining"))
    found = dict(gather.iterate_tensors(checkpoint, torch.bfloat16))
    assert {name: value.dtype for name, value in found.items()} == {"weight": torch.bfloat16, "count": torch.int64}
    assert asked == [(checkpoint.path, "deepspeed")]
