"""The run directory: writable, and room for the checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import room
from pipeline.config.load import load
from pipeline.config.room import bytes_below, checkpoint_bytes, room_problems, weights_in
from pipeline.config.schema import Recipe
from tests.unit.pipeline.config.recipes import CONNECTOR, CONTRASTIVE, PRETRAINING, write

GIB = 1024**3
Usage = namedtuple("Usage", "total used free")


def model(folder: Path, *shapes: list[int]) -> Path:
    """A folder whose weights have these shapes, without data."""
    folder.mkdir()
    tensors = {f"w{number}": {"dtype": "F32", "shape": shape} for number, shape in enumerate(shapes)}
    header = json.dumps({"__metadata__": {}, **tensors}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def recipe(folder: Path, text: str, *sets: str) -> Recipe:
    return load(write(folder, text), [f"run_dir={folder}/new/run", *sets]).recipe


def test_only_weights_with_an_optimizer_state_count(tmp_path: Path) -> None:
    llm = model(tmp_path / "llm", [1000, 100], [50])
    assert weights_in(llm) == 100_050
    path = f"model.llm={{path: {llm}}}"
    assert checkpoint_bytes(recipe(tmp_path, PRETRAINING, path)) == 100_050 * 12
    assert checkpoint_bytes(recipe(tmp_path, PRETRAINING, path, "train.precision=bf16")) == 100_050 * 12, "ZeRO-3"
    assert checkpoint_bytes(recipe(tmp_path, CONNECTOR, f"model.llm.path={llm}")) == 0, "the LLM is frozen"
    visual = "model.visual={backbone: {path: X, train: Y}}".replace("X", str(llm))
    assert checkpoint_bytes(recipe(tmp_path, CONTRASTIVE, visual.replace("Y", "full"))) == 100_050 * 12
    assert checkpoint_bytes(recipe(tmp_path, CONTRASTIVE, visual.replace("Y", "frozen"))) == 0
    adapted = "train.parts={llm: {mode: lora}}"
    assert checkpoint_bytes(recipe(tmp_path, PRETRAINING, path, adapted)) == 0, "adapters are small"
    (llm / "model.safetensors").write_bytes(b"damaged")
    assert weights_in(llm) == 0


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model(tmp_path / "llm", [GIB // 12])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2 * GIB))
    path = f"model.llm={{path: {llm}}}"
    assert not list(room_problems(recipe(tmp_path, PRETRAINING, path))), "one, at the end"
    often = recipe(tmp_path, PRETRAINING, path, "train.checkpoint.every_steps=5")
    (problem,) = room_problems(often)
    assert problem.text == (
        f"run_dir={tmp_path}/new/run: its disk has 2.0 GiB for checkpoints, but 3 of about 1.0 GiB must fit"
        " (train.checkpoint.keep=2, and one being written); free space, lower train.checkpoint.keep, or choose another"
        " run_dir"
    )
    held = tmp_path / "new" / "run" / "checkpoints" / "step-1"
    held.mkdir(parents=True)
    with (held / "state").open("wb") as handle:
        os.truncate(handle.fileno(), GIB)
    assert not list(room_problems(often)), "older checkpoints make room"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").touch()
    (problem,) = room_problems(recipe(tmp_path, CONNECTOR))
    assert problem.text == f"run_dir={tmp_path}/new/run: {tmp_path}/new is a file; choose another folder"
    (tmp_path / "new").unlink()
    monkeypatch.setattr(room.os, "access", lambda path, mode: False)
    (problem,) = room_problems(recipe(tmp_path, CONNECTOR))
    assert problem.text.endswith(f": {tmp_path} cannot be written by this user; choose another folder")


def test_a_folder_in_which_another_run_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and folders vanish between the look at their names and the look at them."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "weights").write_bytes(b"12345")
    walk = os.walk

    def with_ghosts(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for parent, folders, files in walk(folder):
            folders.append("renamed")
            yield parent, folders, [*files, "gone"]

    monkeypatch.setattr("pipeline.config.room.os.walk", with_ghosts)
    assert bytes_below(tmp_path) == 5 and bytes_below(tmp_path / "none") == 0
