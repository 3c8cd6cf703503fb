"""A row per interval: sums of its steps, then a new one begins."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import dist
from pipeline.engine.observers.base import FinishedStep, Wishes
from pipeline.engine.observers.log import Log
from pipeline.engine.state import TrainState
from tests.source_tree import ROOT


def training(every: int, peak_tflops: float | None, eval_every: int = 0) -> Any:
    train = SimpleNamespace(
        log_every_steps=every, peak_tflops=peak_tflops, eval_every_steps=eval_every,
        health=SimpleNamespace(straggler_ratio=1.2),
    )  # fmt: skip
    stage = SimpleNamespace(
        reduce=lambda sums: {"loss": sums["loss"] / sums["valid_tokens"]}, flops_per_step=lambda batches: 3e6
    )
    return SimpleNamespace(
        recipe=SimpleNamespace(train=train, name="a-run"), device=torch.device("cpu"), stage=stage,
        engine=SimpleNamespace(own_time=SimpleNamespace(take=lambda: 1.0)), ranks=dist.Ranks(0, 0, 1),
        state=TrainState(
            data={"epoch": 2}, bad_samples=[4], skipped_steps=1, skipped_total=5, spikes=6, rollbacks=7
        ),
    )  # fmt: skip


def step(loss: float, last: bool = False, applied: bool = True) -> FinishedStep:
    batch: Any = SimpleNamespace(wait_seconds=0.25, micro_batches=[])
    sums = {"loss": torch.tensor(loss), "valid_tokens": torch.tensor(4.0)}
    return FinishedStep(batch, 4, 2, 0.1, sums, last, applied, grad_norm=1.5)


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
    health = ("skipped_steps", "skipped_in_a_row", "spikes", "rollbacks")
    assert [row[f"train/{name}"] for name in health] == [5, 1, 6, 7]
    assert row["perf/tokens_per_second"] == pytest.approx(2 * row["perf/samples_per_second"])
    assert row["perf/samples_per_second"] * row["perf/seconds_per_step"] == pytest.approx(2)
    assert ("perf/mfu" in row) == (peak is not None)
    assert log.on_step(step(2.0, last=True), Wishes(), 0)["train/loss"] == pytest.approx(0.75), "since the last row"


def test_rates_of_parts_are_shown() -> None:
    run = training(1, None)
    run.state.step = 1
    row = Log(run).on_step(replace(step(8.0), part_rates={"llm": 0.0, "visual.word": 0.02}), Wishes(), 0)
    assert (row["train/lr"], row["train/lr/llm"], row["train/lr/visual.word"]) == (0.1, 0.0, 0.02)


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


@pytest.mark.parametrize(("steps", "shown"), [("sa", 2.0), ("asa", 2.0), ("ass", 2.0), ("ss", float("nan"))])
def test_the_loss_is_that_of_steps_that_were_applied(steps: str, shown: float) -> None:
    """A step that was not applied has perhaps no finite loss; it is shown if there is no other."""
    run = training(len(steps), None)
    log = Log(run)
    for run.state.step, kind in enumerate(steps, start=1):
        row = log.on_step(step(8.0 if kind == "a" else float("nan"), applied=kind == "a"), Wishes(), 0)
    assert row["train/loss"] == pytest.approx(shown, nan_ok=True)


def test_an_undone_interval_is_not_reported() -> None:
    run = training(2, None)
    log = Log(run)
    run.state.step = 1
    log.on_step(step(1000.0), Wishes(), 0)
    log.on_rollback()
    run.state.step = 2
    assert log.on_step(step(8.0), Wishes(), 0)["train/loss"] == 2.0


def test_the_slowest_rank_is_in_the_row_and_a_straggler_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 2 computes longest and waits for data least: the others' time goes into waiting for it."""
    own, wait = [1.0, 1.0, 3.0, 1.0], [0.5, 4.0, 0.25, 0.5]
    monkeypatch.setattr(
        dist, "host_numbers",
        lambda mine: [[*mine[:-2], *numbers] for numbers in zip(own, wait, strict=True)],
    )  # fmt: skip
    monkeypatch.setattr(dist, "gather_objects", lambda host: ["a", "a", "b", "b"])
    run = training(1, None)
    log = Log(run)
    log.on_start(Wishes())
    for run.state.step in range(1, 6):
        row = log.on_step(step(8.0), Wishes(), 0)
    assert (row["perf/slowest_rank"], row["perf/straggler_ratio"], row["data/slowest_wait"]) == (2, 3.0, 4.0)
    assert row["train/loss"] == 2.0
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in row if f"`{name}`" not in page] == []
    (record,) = caplog.records
    assert record.getMessage() == "a-run step 3: rank 2 on b computes 3.00 times as long as the median rank"
    own[2] = 1.0
    for run.state.step in range(6, 9):
        log.on_step(step(8.0), Wishes(), 0)
    assert caplog.records[-1].getMessage() == "a-run step 8: rank 2 on b is no longer slow"


def test_one_rank_is_compared_with_none() -> None:
    run = training(1, None)
    run.state.step = 1
    assert "perf/slowest_rank" not in Log(run).on_step(step(8.0), Wishes(), 0)
