"""Held-out metrics: before the first step, every `train.eval_every_steps`, and after the last step."""

from __future__ import annotations

import logging

from pipeline.engine.averaging import averaged
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.state import restore_rng, rng_state
from pipeline.engine.training import Training
from pipeline.stages.base import EvaluationStopped

logger = logging.getLogger(__name__)


def follows(training: Training, step: FinishedStep) -> bool:
    """Whether an evaluation comes after this step, unless the run stops."""
    every = training.recipe.train.eval_every_steps
    return bool(every and training.state.step % every == 0) or step.last


class Evaluate(Observer):
    """Runs the stage's evaluation, and says when its best metric beats all before.

    If asked to stop meanwhile, it restores the state and sets `TrainState.evaluation_due` for the run that resumes.
    """

    def on_start(self, wishes: Wishes) -> Metrics:
        state = self.training.state
        if state.step == 0:
            return self.evaluate(Wishes())  # an untrained model is not worth keeping
        if not state.evaluation_due:
            return {}
        metrics = self.evaluate(wishes)
        wishes.save = True
        wishes.stop = wishes.stop or state.evaluation_due
        return metrics

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        state, recipe = self.training.state, self.training.recipe
        due = follows(self.training, step) and not wishes.rollback
        state.evaluation_due = bool(due and recipe.data.eval)
        metrics = self.evaluate(wishes) if due and not wishes.stop else {}
        wishes.stop = wishes.stop or state.evaluation_due
        return metrics

    def evaluate(self, wishes: Wishes) -> Metrics:
        """All ranks must call."""
        state, stage = self.training.state, self.training.stage
        module, random = self.training.engine.module, rng_state()
        module.eval()
        try:
            with self.training.phases.during("evaluation"), averaged(self.training):
                metrics = stage.evaluate(self.training.engine.forward, self._stop_requested)
        except EvaluationStopped:
            restore_rng(random)
            name = self.training.recipe.name
            logger.info("%s step %d  held-out: stopped; done again when resumed", name, state.step)
            return {}
        finally:
            module.train()
        state.evaluation_due = False
        if self._is_best(metrics):
            wishes.best = wishes.save = True
        return metrics

    def _stop_requested(self) -> bool:
        # at step 0 there is nothing to save: a stop that did not end the process waits for the first step
        return self.training.stop.requested and self.training.state.step > 0

    def _is_best(self, metrics: Metrics) -> bool:
        state, rule = self.training.state, self.training.stage.best_metric
        if rule is None or rule[0] not in metrics:
            return False
        name, direction = rule
        value, best = metrics[name], state.best.get("value")
        improved = best is None or (value < best if direction == "min" else value > best)
        if improved:
            state.best = {"metric": name, "value": value, "step": state.step}
        return improved
