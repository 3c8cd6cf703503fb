"""A copy in DeepSpeed's universal format is whole, or made again, or refused with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.engine import checkpoint as checkpoints
from pipeline.engine.reshard import to_universal
from pipeline.engine.zero_shards import ZeroShards
from pipeline.errors import CheckpointError
from tests.unit.pipeline.engine.test_checkpoint import make
from tests.unit.pipeline.engine.test_zero_shards import write


@pytest.fixture
def checkpoint(tmp_path: Path) -> checkpoints.Checkpoint:
    path = make(tmp_path, 1)
    write(path / "deepspeed")
    return checkpoints.open_checkpoint(path)


def test_done_once_and_again_if_damaged(checkpoint: checkpoints.Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    half_done = checkpoints.universal_folder(checkpoint.path) / "leftover"
    half_done.mkdir(parents=True)
    told: list[tuple[int, int]] = []
    folder = to_universal(checkpoint, progress=lambda done, total: told.append((done, total)))
    assert told == [(9, 9)]
    assert not half_done.exists(), "an unfinished conversion starts over"
    file = folder / checkpoints.universal_tag(checkpoint) / "zero" / "weight" / "exp_avg.pt"
    assert torch.load(file)["param"].tolist() == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert torch.load(file.with_name("step.pt")) == 4
    written = file.stat().st_mtime_ns
    assert to_universal(checkpoint) == folder and file.stat().st_mtime_ns == written
    file.write_bytes(b"damaged")
    assert to_universal(checkpoint) == folder and "was damaged or made by an earlier release" in caplog.text
    assert torch.load(file)["param"].shape == (3, 3)


def test_a_conversion_that_was_killed_starts_over(
    checkpoint: checkpoints.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: ZeroShards, name: str, kind: str) -> torch.Tensor:
        raise KeyboardInterrupt

    out = tmp_path / "copies" / "universal"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ZeroShards, "tensor", killed)
        to_universal(checkpoint, out)
    assert not (out / "COMPLETE").exists()
    assert (to_universal(checkpoint, out) / "COMPLETE").is_file()


def test_what_is_no_zero_checkpoint(tmp_path: Path) -> None:
    checkpoint = checkpoints.open_checkpoint(make(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"step-000001/deepspeed is not a ZeRO checkpoint"):
        to_universal(checkpoint)
    assert not checkpoints.universal_folder(checkpoint.path).exists()


def test_a_folder_with_other_files_stays(checkpoint: checkpoints.Checkpoint) -> None:
    for folder in (checkpoint.path, checkpoint.path / "deepspeed"):  # the first one even has a COMPLETE
        with pytest.raises(CheckpointError, match=f"{folder} holds other files; name a new folder"):
            to_universal(checkpoint, folder)
    assert (checkpoint.path / "part.bin").is_file()


def test_a_disk_without_room_and_one_that_cannot_be_written(
    checkpoint: checkpoints.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"step-000001 could not be converted: .*Not a directory.*\n  fix: free"):
        to_universal(checkpoint, checkpoint.path / "part.bin" / "below")

    def little(path: Any) -> Any:
        return SimpleNamespace(free=5_000)

    monkeypatch.setattr(shutil, "disk_usage", little)
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB on the disk of .*, where 0\.00 GB are free; free space"):
        to_universal(checkpoint, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
