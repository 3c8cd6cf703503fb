"""Checkpoints on disk: complete or absent, verified, never guessed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.engine import checkpoint as checkpoints
from pipeline.engine.state import TrainState, restore_rng, rng_state, seed_everything
from pipeline.errors import CheckpointError


def make(run_dir: Path, step: int, complete: bool = True, payload: bytes = b"weights") -> Path:
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "part.bin").write_bytes(payload)
    parts = {"part.bin": {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}}
    manifest = {"format_version": 1, "step": step, "world_size": 2, "parts": parts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "state.json").write_text(json.dumps(TrainState(step=step).to_dict()))
    if complete:
        (folder / "COMPLETE").touch()
    return folder


def test_only_complete_checkpoints_exist(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)
    unfinished = make(tmp_path, 3, complete=False)
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path)] == [1, 2]
    latest = checkpoints.latest_checkpoint(tmp_path)
    assert latest is not None and latest.step == 2 and latest.world_size == 2
    assert latest.state().step == 2
    with pytest.raises(CheckpointError, match=r"step-000003 is incomplete \(no COMPLETE file\)"):
        checkpoints.open_checkpoint(unfinished)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.open_checkpoint(tmp_path / "nothing")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoints.latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
        checkpoints.best_checkpoint(tmp_path)


def test_other_format_version_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format_version": 99}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="checkpoint format 99, this version reads 1"):
        checkpoints.open_checkpoint(folder)


def test_verify_names_missing_short_and_flipped_parts(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    checkpoint = checkpoints.open_checkpoint(folder)
    assert checkpoints.verify(checkpoint) == []
    (folder / "part.bin").write_bytes(b"weighTs")
    assert "part.bin is damaged" in checkpoints.verify(checkpoint)[0]
    (folder / "part.bin").write_bytes(b"wei")
    assert "part.bin has 3 bytes, the manifest says 7" in checkpoints.verify(checkpoint)[0]
    (folder / "part.bin").unlink()
    assert "part.bin is missing" in checkpoints.verify(checkpoint)[0]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    folders = [make(tmp_path, step) for step in (1, 2, 3, 4)]
    leftover = tmp_path / "checkpoints" / ".tmp-step-000005"
    leftover.mkdir()
    checkpoints.mark_best(tmp_path, folders[1])
    checkpoints.prune(tmp_path, keep=1)
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path)] == [2, 4]
    assert checkpoints.best_checkpoint(tmp_path).step == 2
    assert not leftover.exists()


def test_write_durably_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    checkpoints.write_durably(path, "a long old value")
    checkpoints.write_durably(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_random_numbers_continue_where_they_were(tmp_path: Path) -> None:
    import random

    import numpy as np
    import torch

    seed_everything(3, rank=1)
    torch.save(rng_state(), tmp_path / "rng.pt")
    first = random.random(), float(np.random.rand()), float(torch.rand(()))
    restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == first
