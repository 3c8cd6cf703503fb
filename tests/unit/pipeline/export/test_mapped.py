"""Pages of mapped files do not pile up in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.export.mapped import MappedFiles

MEBI = 2**20


def resident_bytes(of: Path) -> int:
    """Bytes of a file's mappings that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(of))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    given = {name: torch.randn(10 * MEBI) for name in "ab"}
    path = tmp_path / "model.safetensors"
    save_file(given, path)
    found = load_file(path)
    mapped = MappedFiles([tmp_path])
    assert len(mapped.ranges) >= 1
    for name in "ab":
        assert torch.equal(found[name], given[name])
        mapped.read(40 * MEBI)
        assert resident_bytes(path) < MEBI
    assert torch.equal(found["a"], given["a"]), "they are still there"
    mapped.read(MEBI)
    assert resident_bytes(path) >= 40 * MEBI, "not for every small tensor"


def test_other_files_and_written_tensors_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    save_file({"a": torch.zeros(MEBI)}, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert MappedFiles([tmp_path / "other"]).ranges == []
    found["a"][0] = 7
    mapped = MappedFiles([tmp_path])
    mapped.drop()
    assert found["a"][0] == 7 and mapped.ranges == []
