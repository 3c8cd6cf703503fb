"""Steps that were not applied are counted, and too many in a row end the run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.load import load_recipe
from pipeline.engine.observers.base import Wishes
from pipeline.engine.observers.divergence import Divergence
from pipeline.engine.state import TrainState
from pipeline.errors import DivergedError


def test_a_diverged_run_stops_after_consecutive_skipped_steps() -> None:
    recipe = load_recipe("demo_contrastive", ["train.max_skipped_steps=2"])
    engine = SimpleNamespace(skipped_steps=7)  # of the run that was resumed
    training: Any = SimpleNamespace(state=TrainState(step=42), recipe=recipe, engine=engine)
    divergence, step = Divergence(training), Any
    for skipped in (True, True, False, True, True):
        engine.skipped_steps += skipped
        assert divergence.on_step(step, Wishes(), 0) == {}
    assert training.state.skipped_steps == 2, "an applied step starts the count again"
    message = (
        rf"{recipe.name}: gradients were not finite in 3 consecutive steps up to step 42; "
        "lower train.optimizer.lr, lengthen warmup_steps, or check the data"
    )
    engine.skipped_steps += 1
    with pytest.raises(DivergedError, match=message) as error:
        divergence.on_step(step, Wishes(), 0)
    assert error.value.exit_code == 5
