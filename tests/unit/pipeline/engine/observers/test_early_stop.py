"""When a run ends because nothing improves, and what a resumed run knows of it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import dist
from pipeline.config.transfer_schema import EarlyStopConfig
from pipeline.engine.observers.base import FinishedStep, Wishes
from pipeline.engine.observers.early_stop import EarlyStop
from pipeline.engine.state import TrainState
from pipeline.errors import RecipeError
from shards.load.requests import StepBatch
from shards.order.plan import Cursor

STEP = FinishedStep(StepBatch([], Cursor(), [], 0.0, 0), 0, 0, 0.0, {}, False)


def training(tmp_path: Path, own: Any = ("eval/bleu4", "max"), **rule: Any) -> Any:
    stop = EarlyStopConfig(**{"patience": 2, **rule})
    recipe = SimpleNamespace(name="a-run", train=SimpleNamespace(early_stop=stop))
    return SimpleNamespace(
        recipe=recipe, state=TrainState(), total_steps=20, run_dir=tmp_path, ranks=dist.Ranks(0, 0, 1),
        stage=SimpleNamespace(best_metric=own, name="a-stage"),
    )  # fmt: skip


def ends_at(run: Any, values: list[float | None], name: str = "eval/bleu4", first: int = 0) -> int | None:
    """The step that ends the run; None = it goes on. A value per step, if it is evaluated."""
    observer = EarlyStop(run)
    for step, value in enumerate(values, first):
        run.state.step = step
        wishes = Wishes(metrics={} if value is None else {name: value, "train/loss": 1.0})
        observer.on_start(wishes) if step == first else observer.on_step(STEP, wishes, 0)
        assert wishes.stop == wishes.finished == observer.ended
        if wishes.finished:
            observer.on_end()
            return step
    observer.on_end()
    return None


def test_the_evaluation_at_the_start_is_the_first_to_beat(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert ends_at(training(tmp_path), [5.0, None, 4.0, None, 5.0, 9.0]) == 4
    assert (
        "a-run: ended early at step 4 of 20: eval/bleu4 has not improved by more than 0 in 2 evaluations since step 0 "
        "(5); the best checkpoint is none: the start was better"
    ) in caplog.text
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best").write_text("step-000001")
    assert ends_at(training(tmp_path), [1.0, 2.0, 2.0, 1.5]) == 3
    assert "the best checkpoint is step-000001" in caplog.text


@pytest.mark.parametrize(
    ("rule", "values", "ends"),
    [
        ({}, [1.0, 0.9, 1.1, 1.0, 1.2, 1.1], None),
        ({"min_delta": 0.2}, [1.0, 1.1, 1.2, 1.3], 2),
        ({"min_delta": 0.2}, [1.0, 1.1, 1.3, 1.4, 1.5], 4),
        ({"metric": "eval/bleu4", "direction": "min"}, [1.0, 1.1, 0.9, 1.0, 0.9], 4),
        ({"patience": 1}, [1.0, 1.0], 1),
        ({}, [math.nan, 0.5, math.nan, 0.4], 3),
        ({}, [1.0, 0.5] + [None] * 18 + [0.4], None),  # the last step is the end anyhow
    ],
)
def test_patience_and_direction(tmp_path: Path, rule: dict[str, Any], values: list[float | None], ends: int) -> None:
    assert ends_at(training(tmp_path, **rule), values) == ends


def test_a_run_that_resumes_goes_on_counting_and_an_ended_one_stays_ended(tmp_path: Path) -> None:
    run = training(tmp_path)
    assert ends_at(run, [5.0, 4.0]) is None
    resumed = training(tmp_path)
    resumed.state = TrainState.from_dict(run.state.to_dict())
    assert ends_at(resumed, [None, 4.5, 9.0], first=1) == 2
    assert resumed.state.early_stop == {"metric": "eval/bleu4", "value": 5.0, "step": 0, "waited": 2}
    again = training(tmp_path)
    again.state = TrainState.from_dict(resumed.state.to_dict())
    assert ends_at(again, [None], first=2) == 2, "nothing is trained"
    patient = training(tmp_path, patience=3)
    patient.state = TrainState.from_dict(resumed.state.to_dict())
    assert ends_at(patient, [None, 4.9], first=2) == 3
    other = training(tmp_path, metric="eval/rouge_l", direction="max")
    other.state = TrainState.from_dict(resumed.state.to_dict())
    assert ends_at(other, [None, 1.0, 1.0], "eval/rouge_l", first=2) is None, "another metric begins anew"


def test_what_no_evaluation_has(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.early_stop: the a-stage stage names no best metric; set metric an"):
        EarlyStop(training(tmp_path, own=None))
    with pytest.raises(
        RecipeError, match=r"metric: evaluations of this recipe have no eval/bleu4; they have eval/bleu, eval/x"
    ):
        EarlyStop(training(tmp_path)).on_step(STEP, Wishes(metrics={"eval/x": 1.0, "eval/bleu": 2.0}), 0)
