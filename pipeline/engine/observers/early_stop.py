"""Ends a run whose held-out metric no longer improves, if `train.early_stop` asks for it."""

from __future__ import annotations

import logging
import math

from pipeline import dist
from pipeline.config.schema import Recipe
from pipeline.engine.checkpoint import best_name
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.training import Training
from pipeline.errors import RecipeError

logger = logging.getLogger(__name__)


class EarlyStop(Observer):
    """Counts evaluations without improvement; that before the first step counts as the first value to beat.

    What it has seen is in `TrainState.early_stop`, so a run that resumes or rolls back goes on counting from there.

    Raises:
        RecipeError: the stage names no best metric and the recipe none either, or evaluations do not have it.
    """

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        rule, own = training.recipe.train.early_stop, training.stage.best_metric
        assert rule is not None  # else it is not enabled
        self.rule = rule
        if rule.metric is not None and rule.direction is not None:
            own = (rule.metric, rule.direction)
        if own is None:
            raise RecipeError(
                f"train.early_stop: the {training.stage.name} stage names no best metric; set metric and direction"
            )
        self.metric, self.direction = own
        self.ended = False

    @classmethod
    def enabled(cls, recipe: Recipe) -> bool:
        return recipe.train.early_stop is not None

    def on_start(self, wishes: Wishes) -> Metrics:
        self._follow(wishes)
        self._end_if_due(wishes)  # also of a run that ended here before
        return {}

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        self._follow(wishes)
        self._end_if_due(wishes)
        return {}

    def on_end(self) -> None:
        state, rule = self.training.state, self.rule
        if not self.ended or not self.training.ranks.is_main:
            return
        logger.info(
            "%s: ended early at step %d of %d: %s has not improved by more than %g in %d evaluations since step %d "
            "(%.4g); the best checkpoint is %s",
            self.training.recipe.name, state.step, self.training.total_steps, self.metric, rule.min_delta,
            state.early_stop["waited"], state.early_stop["step"], state.early_stop["value"],
            best_name(self.training.run_dir) or "none: the start was better",
        )  # fmt: skip

    def _follow(self, wishes: Wishes) -> None:
        """Take this step's evaluation into account, if there was one."""
        scores = sorted(name for name in wishes.metrics if name.startswith("eval/"))
        if not scores:
            return
        if self.metric not in wishes.metrics:
            raise RecipeError(
                f"train.early_stop.metric: evaluations of this recipe have no {self.metric}; they have "
                f"{', '.join(scores)}"
            )
        value = float(dist.broadcast_object(wishes.metrics[self.metric]))  # devices may round differently
        state, seen = self.training.state, self.training.state.early_stop
        if seen.get("metric") != self.metric or self._improves(value, seen["value"]):
            state.early_stop = {"metric": self.metric, "value": value, "step": state.step, "waited": 0}
        else:
            state.early_stop = {**seen, "waited": seen["waited"] + 1}

    def _improves(self, value: float, best: float) -> bool:
        gain = best - value if self.direction == "min" else value - best
        return gain > self.rule.min_delta or (math.isnan(best) and not math.isnan(value))

    def _end_if_due(self, wishes: Wishes) -> None:
        state = self.training.state
        waited = state.early_stop.get("waited", 0) if state.early_stop.get("metric") == self.metric else 0
        if waited >= self.rule.patience and state.step < self.training.total_steps:
            self.ended = wishes.finished = wishes.stop = True
