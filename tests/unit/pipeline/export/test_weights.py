"""The weight files of an export: their size is known and said before they are written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.export import weights
from pipeline.export.entry import Entry
from pipeline.export.journal import Journal
from pipeline.export.mapped import MappedFiles
from pipeline.export.safetensors_file import plan_files
from pipeline.export.weights import Weights, check_room, write_weights


def planned(count: int, numbers: int) -> Weights:
    entries = [Entry(f"w{at}", (numbers,), torch.float32, lambda: torch.zeros(numbers)) for at in range(count)]
    return Weights(plan_files(entries, 1 << 40), [])


def test_a_disk_without_room_is_refused_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_000_000_000))
    entry = Entry("w", (10**9,), torch.float32, lambda: torch.zeros(0))
    weights_ = Weights(plan_files([entry], 1 << 40), [])
    message = rf"the export needs 4\.000 GB, but the disk of {tmp_path} has 3\.000 GB free; free space, or give another"
    with pytest.raises(CheckpointError, match=message):
        check_room(weights_, Journal(tmp_path / ".tmp-export", {}))
    assert not list(tmp_path.iterdir())


def test_progress_is_in_megabytes_and_ends_with_all_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shown: list[tuple[int, int, str, int]] = []
    journal = Journal(tmp_path / "export", {})
    journal.begin()
    check_room(planned(3, 250_000), journal)
    write_weights(planned(3, 250_000), journal, MappedFiles([]), lambda *row: shown.append(row))
    assert shown == [(1, 3, "MB, 1/3 tensors", 0), (2, 3, "MB, 2/3 tensors", 0), (3, 3, "MB, 3/3 tensors", 0)]
    assert "3 tensors, 0.003 GB in 1 files, 0.003 GB of them still to be written; the disk has" in caplog.text
