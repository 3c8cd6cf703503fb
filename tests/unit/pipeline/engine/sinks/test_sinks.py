"""The metrics file across kills and resumes, and what else gets the rows."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.load import load_recipe
from pipeline.dist import Ranks
from pipeline.engine.metrics import read_metrics
from pipeline.engine.sinks.console import Console
from pipeline.engine.sinks.json_lines import JsonLines
from pipeline.engine.sinks.registry import sinks_of
from pipeline.engine.sinks.tensorboard import TensorBoard
from pipeline.engine.sinks.wandb import WeightsAndBiases
from pipeline.engine.state import TrainState
from pipeline.errors import RecipeError, StorageError
from tests.unit.pipeline.disk import full_disk


def training(run_dir: Path, step: int = 0, rank: int = 0, **train: Any) -> Any:
    """As much of a run as sinks ask for."""
    recipe = load_recipe("demo_contrastive", [])
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tensorboard": False, **train})})
    return SimpleNamespace(
        run_dir=run_dir, recipe=recipe, state=TrainState(step=step), ranks=Ranks(rank, rank, 2), total_steps=10,
        stage=SimpleNamespace(headline=("eval/good",)),
    )  # fmt: skip


def test_rows_after_the_resumed_step_are_dropped_with_a_torn_last_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 3, "a": 3}\n{"step": 4, "a"')
    writer = JsonLines(training(tmp_path, step=2))
    writer.write(3, {"a": 30.0})
    writer.end()
    assert [(row["step"], row["a"]) for row in read_metrics(tmp_path)] == [(1, 1), (3, 30.0)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    every = {"tensorboard": True, "wandb_project": "p"}
    assert sinks_of(training(tmp_path, rank=1, **every)) == []
    assert list(tmp_path.iterdir()) == []


def test_rank_0_writes_where_the_recipe_says(tmp_path: Path) -> None:
    plain, more = (sinks_of(training(tmp_path, tensorboard=asked)) for asked in (False, True))
    assert [type(sink) for sink in plain] == [JsonLines, Console]
    assert [type(sink) for sink in more] == [JsonLines, TensorBoard, Console]
    assert WeightsAndBiases.enabled(training(tmp_path, wandb_project="p").recipe)


def test_tensorboard_gets_the_same_values(tmp_path: Path) -> None:
    writer = TensorBoard(training(tmp_path, tensorboard=True))
    writer.write(1, {"train/loss": 2.5})
    writer.end()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [2.5]


def test_a_full_disk_is_told_by_the_files_name(tmp_path: Path) -> None:
    writer = JsonLines(training(tmp_path))
    with (
        full_disk(100),
        pytest.raises(StorageError, match=r"metrics\.jsonl could not be written: File too large") as error,
    ):
        for step in range(10):
            writer.write(step, {"train/loss": 1.0})
    assert error.value.exit_code == 2


def test_wandb_asked_for_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError, match=r"wandb_project is set but wandb is not installed; pip install 'llava-slt"):
        WeightsAndBiases(training(tmp_path, wandb_project="p"))


def test_people_see_training_and_the_headline_of_evaluations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    console = Console(training(tmp_path))
    with caplog.at_level(logging.INFO):
        console.write(3, {"train/loss": 0.5})
        console.write(3, {"eval/good": 7.0, "eval/other": 1.0})
        console.write(3, {"health/temperature": 70.0})
    said = [record.getMessage() for record in caplog.records]
    assert said == ["demo_contrastive step 3/10  loss 0.5", "demo_contrastive step 3  held-out: good 7"]
