"""Keeps a mean of the trained weights over the steps, if `train.averaging` asks for one."""

from __future__ import annotations

from pipeline.config.schema import Recipe
from pipeline.engine.averaging import check_averaging, update_averages
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.training import Training


class Average(Observer):
    """Takes every step that was applied into the mean; evaluations and exports use it (`pipeline.engine.averaging`)."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        check_averaging(training.engine.engine)

    @classmethod
    def enabled(cls, recipe: Recipe) -> bool:
        return recipe.train.averaging.kind == "ema"

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        rule = self.training.recipe.train.averaging
        if step.applied:
            update_averages(self.training.engine.engine, rule.decay, self.training.state.step <= rule.start)
        return {}
