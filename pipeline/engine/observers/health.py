"""Steps that were not applied, and spikes of the gradient norm and the loss: counted, named, and what is done then."""

from __future__ import annotations

import logging
import math

from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.spikes import Spikes
from pipeline.engine.training import Training

logger = logging.getLogger(__name__)


class Health(Observer):
    """Finds spikes of the gradient norm, which the host knows before weights change, and asks for a rollback after
    more than `train.max_skipped_steps` steps in a row that were not applied."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self._follow()

    def on_rollback(self) -> None:
        self._follow()

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        state, train = self.training.state, self.training.recipe.train
        mean = self.norms.mean
        if self.norms.found(step.grad_norm):
            state.spikes += 1
            what = f"gradient norm {step.grad_norm:.4g} is above {train.health.spike_factor:g} times its running mean"
            fate = "clipped and applied" if step.applied else "not applied"
            _name(self.training, f"{what} of {mean:.4g}; the step was {fate}")
        elif not step.applied:
            most = f"{state.skipped_steps} in a row, of at most {train.max_skipped_steps}"
            _name(self.training, f"the loss or a gradient is not finite; the step was not applied ({most})")
        self._set_limit()
        if state.skipped_steps > train.max_skipped_steps:
            what = "not finite" if train.health.on_spike == "warn" else "not finite, or spikes,"
            wishes.rollback = (
                f"gradients were {what} in {state.skipped_steps} consecutive steps up to step {state.step}"
            )
        return {}

    def _follow(self) -> None:
        health = self.training.recipe.train.health
        seen = self.training.state.running_means.setdefault("grad_norm", [0.0, 0.0])
        self.norms = Spikes(health.spike_factor, health.spike_window_steps, seen)
        self._set_limit()

    def _set_limit(self) -> None:
        refuse = self.training.recipe.train.health.on_spike != "warn"
        self.training.engine.gate.limit = self.norms.limit if refuse else math.inf


class LossSpikes(Observer):
    """Finds spikes of the loss in rows of metrics: in a step's own time no host knows its loss, so that the update
    cannot be left out, only undone by a rollback."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.steps = 0
        self._follow()

    def on_rollback(self) -> None:
        self.steps = 0
        self._follow()

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        self.steps += 1
        if "train/loss" not in wishes.metrics:
            return {}
        state, health = self.training.state, self.training.recipe.train.health
        loss, mean = wishes.metrics["train/loss"], self.losses.mean
        steps, self.steps = self.steps, 0
        if not self.losses.found(loss, steps):
            return {}
        state.spikes += 1
        what = f"loss {loss:.4g} is above {health.loss_spike_factor:g} times its running mean of {mean:.4g}"
        _name(self.training, what)
        if health.on_spike == "rollback":
            wishes.rollback = wishes.rollback or f"{what} at step {state.step}"
            wishes.trouble_after = state.step - steps
        return {"train/spikes": state.spikes}

    def _follow(self) -> None:
        health = self.training.recipe.train.health
        seen = self.training.state.running_means.setdefault("loss", [0.0, 0.0])
        self.losses = Spikes(health.loss_spike_factor, health.spike_window_steps, seen)


def _name(training: Training, what: str) -> None:
    if training.ranks.is_main:
        logger.warning("%s step %d: %s", training.recipe.name, training.state.step, what)
