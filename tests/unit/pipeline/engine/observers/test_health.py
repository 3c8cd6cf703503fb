"""Steps that were not applied and spikes: what is counted, named, refused and asked for."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import dist
from pipeline.config.load import load_recipe
from pipeline.engine.gate import Gate
from pipeline.engine.observers.base import FinishedStep, Wishes
from pipeline.engine.observers.health import Health, LossSpikes
from pipeline.engine.state import TrainState


def training(*sets: str, rank: int = 0) -> Any:
    recipe = load_recipe("demo_contrastive", ["train.health.spike_window_steps=4", *sets])
    engine = SimpleNamespace(gate=Gate())
    return SimpleNamespace(recipe=recipe, engine=engine, state=TrainState(step=42), ranks=dist.Ranks(rank, rank, 2))


def step(norm: float = 1.0, applied: bool = True) -> FinishedStep:
    batch: Any = None
    return FinishedStep(batch, 1, 1, 0.1, {}, last=False, applied=applied, grad_norm=norm)


def test_too_many_steps_in_a_row_that_were_not_applied_ask_for_a_rollback(caplog: pytest.LogCaptureFixture) -> None:
    run, wishes = training("train.max_skipped_steps=2"), Wishes()
    health = Health(run)
    run.state.skipped_steps = 2
    assert caplog.text == ""
    assert health.on_step(step(math.inf, applied=False), wishes, 0) == {} and not wishes.rollback
    run.state.skipped_steps = 3
    health.on_step(step(math.inf, applied=False), wishes, 0)
    assert wishes.rollback == "gradients were not finite in 3 consecutive steps up to step 42"
    assert run.state.spikes == 0, "what is not finite is no spike"
    what = "the loss or a gradient is not finite; the step was not applied"
    assert f"{run.recipe.name} step 42: {what} (2 in a row, of at most 2)" in caplog.text


@pytest.mark.parametrize("on_spike", ["warn", "skip", "rollback"])
def test_a_spike_of_the_norm_is_named_once_and_refused_if_asked_for(
    on_spike: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, other = (training(f"train.health.on_spike={on_spike}", rank=rank) for rank in (0, 1))
    refused = on_spike != "warn"
    for one in (run, other):
        health = Health(one)
        for _ in range(4):
            assert one.engine.gate.limit == math.inf
            health.on_step(step(2.0), Wishes(), 0)
        assert one.engine.gate.limit == (20.0 if refused else math.inf)
        health.on_step(step(50.0, applied=not refused), Wishes(), 0)
        assert one.state.spikes == 1
        assert one.engine.gate.limit == pytest.approx(65.0 if refused else math.inf), "it counts as the limit, 20"
    (record,) = caplog.records
    fate = "not applied" if refused else "clipped and applied"
    assert record.getMessage() == (
        f"{run.recipe.name} step 42: gradient norm 50 is above 10 times its running mean of 2; the step was {fate}"
    )


def test_refused_spikes_count_as_steps_not_applied() -> None:
    run, wishes = training("train.health.on_spike=skip"), Wishes()
    run.state.skipped_steps = 11
    Health(run).on_step(step(50.0, applied=False), wishes, 0)
    assert wishes.rollback == "gradients were not finite, or spikes, in 11 consecutive steps up to step 42"


@pytest.mark.parametrize("on_spike", ["warn", "skip", "rollback"])
def test_a_spike_of_the_loss_is_found_in_rows(on_spike: str, caplog: pytest.LogCaptureFixture) -> None:
    run = training(f"train.health.on_spike={on_spike}")
    losses = LossSpikes(run)
    for loss in (2.0, 2.0, 7.0):
        assert losses.on_step(step(), Wishes(), 0) == {}
        wishes = Wishes(metrics={"train/loss": loss})
        metrics = losses.on_step(step(), wishes, 0)
    assert metrics == {"train/spikes": 1} and run.state.spikes == 1
    what = "loss 7 is above 3 times its running mean of 2"
    assert wishes.rollback == (f"{what} at step 42" if on_spike == "rollback" else "")
    assert wishes.trouble_after == (40 if on_spike == "rollback" else None), "two steps make the row"
    with caplog.at_level(logging.WARNING):
        assert f"{run.recipe.name} step 42: {what}" in caplog.text


def test_behind_a_rollback_the_means_are_those_of_the_checkpoint() -> None:
    run = training("train.health.on_spike=skip")
    health, losses = Health(run), LossSpikes(run)
    run.state.running_means = {"grad_norm": [3.0, 9.0], "loss": [4.0, 9.0]}
    losses.steps = 5
    health.on_rollback()
    losses.on_rollback()
    assert run.engine.gate.limit == 30.0 and losses.losses.limit == 12.0 and losses.steps == 0
