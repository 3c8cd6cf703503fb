"""A row per interval: sums of its steps, then a new one begins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.engine.observers.base import FinishedStep, Wishes
from pipeline.engine.observers.log import Log
from pipeline.engine.state import TrainState


def training(every: int, peak_tflops: float | None, eval_every: int = 0, norm: torch.Tensor | float = 1.5) -> Any:
    train = SimpleNamespace(log_every_steps=every, peak_tflops=peak_tflops, eval_every_steps=eval_every)
    stage = SimpleNamespace(
        reduce=lambda sums: {"loss": sums["loss"] / sums["valid_tokens"]}, flops_per_step=lambda batches: 3e6
    )
    return SimpleNamespace(
        recipe=SimpleNamespace(train=train), device=torch.device("cpu"), stage=stage,
        engine=SimpleNamespace(grad_norm=lambda: norm), state=TrainState(data={"epoch": 2}, bad_samples=[4]),
    )  # fmt: skip


def step(loss: float, last: bool = False) -> FinishedStep:
    batch: Any = SimpleNamespace(wait_seconds=0.25, micro_batches=[])
    sums = {"loss": torch.tensor(loss), "valid_tokens": torch.tensor(4.0)}
    return FinishedStep(batch, valid_tokens=4, samples=2, learning_rate=0.1, sums=sums, last=last)


@pytest.mark.parametrize("peak", [None, 1.0])
def test_an_interval_is_summed_and_reported_once(peak: float | None) -> None:
    run = training(2, peak)
    log = Log(run)
    rows = []
    for number, loss in enumerate((6.0, 10.0, 4.0), start=1):
        run.state.step = number
        rows.append(log.on_step(step(loss), Wishes(), 0))
    assert rows[0] == rows[2] == {}
    row = rows[1]
    assert (row["train/loss"], row["train/lr"], row["train/grad_norm"], row["train/epoch"]) == (2.0, 0.1, 1.5, 2)
    assert (row["data/wait_seconds"], row["data/bad_samples"]) == (0.5, 1)
    assert row["perf/tokens_per_second"] == pytest.approx(2 * row["perf/samples_per_second"])
    assert row["perf/samples_per_second"] * row["perf/seconds_per_step"] == pytest.approx(2)
    assert ("perf/mfu" in row) == (peak is not None)
    assert log.on_step(step(2.0, last=True), Wishes(), 0)["train/loss"] == pytest.approx(0.75), "since the last row"


def test_a_stop_ends_the_interval() -> None:
    run = training(100, None)
    run.state.step = 1
    assert Log(run).on_step(step(8.0), Wishes(stop=True), 0)["train/loss"] == 2.0


def test_an_evaluation_ends_the_interval() -> None:
    """It may be stopped, and the run that resumes begins a new interval."""
    run = training(100, None, eval_every=3)
    log = Log(run)
    for run.state.step in (1, 2):
        assert log.on_step(step(8.0), Wishes(), 0) == {}
    run.state.step = 3
    assert log.on_step(step(8.0), Wishes(), 0)["train/loss"] == 2.0


@pytest.mark.parametrize("norm", [0.5, torch.tensor(0.5), float("inf"), float("nan")])
def test_the_norm_comes_with_the_sums_or_is_a_number_already(norm: torch.Tensor | float) -> None:
    run = training(1, None, norm=norm)
    run.state.step = 1
    row = Log(run).on_step(step(8.0), Wishes(), 0)
    assert row["train/loss"] == 2.0 and row["train/grad_norm"] == pytest.approx(float(norm), nan_ok=True)
