"""Everything that is wrong with a recipe is told at once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.config import preflight
from pipeline.config.cli import app
from pipeline.config.load import load
from pipeline.config.planner import Answer, NotPlanned
from pipeline.config.preflight import check_memory, check_recipe, load_with_inputs
from pipeline.config.resolve import resolve
from pipeline.errors import RecipeError
from tests.unit.pipeline.config.recipes import CONNECTOR, CONTRASTIVE, write
from tests.unit.pipeline.config.test_inputs import world

__all__ = ["world"]
GIB = 1024**3
PLAN = {
    "lines": [{"item": "activations", "bytes": 50 * GIB, "phases": ["backward"], "rule": "8192 tokens"}],
    "phase": "backward", "peak_bytes": 50 * GIB, "gpu_gib": 40,
}  # fmt: skip


def refusal(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert isinstance(result.exception, RecipeError)
    return [line.strip() for line in str(result.exception).splitlines()[1:]]


def test_settings_inputs_and_batch_together(world: Path) -> None:
    path = str(write(world, CONNECTOR))
    missing = ("--set", "data.train.0.shards=shards/vidoe")
    shards = "--set data.train.0.shards=shards/vidoe: data.train.0.shards=shards/vidoe does not exist; build it with"
    shards += " `slt shards build`, or correct the path"
    assert refusal(path, "--world-size", "3", *missing) == [
        "recipe.yaml:14: train.global_batch=8 is not a multiple of train.micro_batch=2 x 3 ranks = 6; 6 or 12 would be",
        shards,
    ]
    assert refusal(path, "--set", "train.stpes=3", "--set", "train.optimizer.lr=0", *missing) == [
        "--set train.optimizer.lr=0: train.optimizer.lr must be greater than 0, got 0",
        "--set train.stpes=3: train.stpes is not a setting; did you mean train.steps?",
        shards,
    ]
    assert refusal(path, "--set", "train.epochs=2", *missing) == [
        "recipe.yaml:13: train.steps=10 and train.epochs=2.0 are both given; set one of them to null",
        shards,
    ], "rules between settings, too"
    assert len(refusal(path, "--set", "stage=conector", *missing)) == 1, "the stage says which inputs matter"
    assert refusal(path, "--set", "data.train.0.shards=", *missing[:1], "run_dir=''")[-1].endswith("run_dir is empty")


def test_a_remark_is_logged(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_with_inputs(write(world, CONTRASTIVE), ["train.global_batch=256"])
    with caplog.at_level(logging.WARNING):
        check_recipe(loaded, [1])
    assert "recipe.yaml: train.global_batch=256 is more than the 5 distinct texts of data.train" in caplog.text


def test_memory(world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[float | None] = []

    def ask(recipe: object, world_size: int) -> Answer:
        asked.append(recipe.deepspeed.gpu_memory_gib)  # type: ignore[attr-defined]
        if len(asked) == 3:
            raise NotPlanned("no torch")
        return Answer("cpu", "50.0 GiB", PLAN, fits=len(asked) == 2)

    monkeypatch.setattr(preflight, "ask", ask)
    path = str(write(world, CONNECTOR))
    assert CliRunner().invoke(app, ["check", path]).exit_code == 0 and not asked, "nobody named the GPU's memory"
    result = CliRunner().invoke(app, ["check", path, "--gpu-memory", "a100-40", "--world-size", "2"])
    text = "a rank of 2 does not fit into its GPU: 50.0 GiB, most in backward: activations 50.0 GiB."
    assert isinstance(result.exception, RecipeError) and text in str(result.exception) and asked == [40]
    resolved = resolve(load(path, ["deepspeed.gpu_memory_gib=80"]).recipe, 2)
    assert check_memory(resolved) is not None
    assert check_memory(resolved) is None and "memory is not planned: no torch" in caplog.text
