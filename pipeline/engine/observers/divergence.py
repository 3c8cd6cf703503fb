"""Stops a diverged run before it burns its budget."""

from __future__ import annotations

from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.training import Training
from pipeline.errors import DivergedError


class Divergence(Observer):
    """Counts consecutive steps that DeepSpeed did not apply because gradients were not finite.

    Raises:
        DivergedError: more than `train.max_skipped_steps`, on every rank.
    """

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.skipped = training.engine.skipped_steps

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        state, recipe = self.training.state, self.training.recipe
        before, self.skipped = self.skipped, self.training.engine.skipped_steps
        state.skipped_steps = state.skipped_steps + 1 if self.skipped > before else 0
        if state.skipped_steps > recipe.train.max_skipped_steps:
            raise DivergedError(
                f"{recipe.name}: gradients were not finite in {state.skipped_steps} consecutive steps up to "
                f"step {state.step}; lower train.optimizer.lr, lengthen warmup_steps, or check the data"
            )
        return {}
