"""The metrics file across kills and resumes, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.schema import OptimizerConfig, TrainConfig
from pipeline.engine.metrics import MetricWriter, describe, peak_tflops, read_metrics
from pipeline.errors import RecipeError, StorageError
from tests.unit.pipeline.disk import full_disk


def config(**values: object) -> TrainConfig:
    given = {"steps": 1, "global_batch": 1, "micro_batch": 1, "tensorboard": False}
    return TrainConfig(optimizer=OptimizerConfig(lr=1.0), **{**given, **values})


def test_rows_after_the_resumed_step_are_dropped_with_a_torn_last_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 3, "a": 3}\n{"step": 4, "a"')
    writer = MetricWriter(tmp_path, config(), "run", resume_step=2, enabled=True)
    writer.write(3, {"a": 30.0})
    writer.close()
    assert [(row["step"], row["a"]) for row in read_metrics(tmp_path)] == [(1, 1), (3, 30.0)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, config(), "run", resume_step=0, enabled=False)
    writer.write(1, {"a": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_same_values(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, config(tensorboard=True), "run", resume_step=0, enabled=True)
    writer.write(1, {"train/loss": 2.5})
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [2.5]


def test_a_full_disk_is_told_by_the_files_name(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path, config(), "run", resume_step=0, enabled=True)
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
        MetricWriter(tmp_path, config(wandb_project="p"), "run", resume_step=0, enabled=True)


def test_peak_of_known_and_given_devices() -> None:
    assert peak_tflops(config(), "NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops(config(), "cpu") is None
    assert peak_tflops(config(peak_tflops=1.5), "cpu") == 1.5


def test_describe() -> None:
    assert describe({"train/loss": 1.23456, "big": 3e9, "nan": float("nan")}) == "loss 1.235  big 3.000e+09  nan nan"
    json.dumps({})
