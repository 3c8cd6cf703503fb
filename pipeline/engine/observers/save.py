"""Checkpoints: by steps, by minutes, after the best evaluation, before a stop and at the end."""

from __future__ import annotations

import time

from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.saving.retention import mark_best, prune
from pipeline.engine.saving.save import save
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.training import Training


class Save(Observer):
    """Saves when a checkpoint is due or asked for. Minutes are by rank 0's clock."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.last_save = time.monotonic()

    def on_start(self, wishes: Wishes) -> Metrics:
        if wishes.save:
            self.training.stop.begin()  # from here on a request to stop waits for the save
            self._save(wishes.best)
        return {}

    def vote(self) -> int:
        minutes = self.training.recipe.train.checkpoint.every_minutes
        return int(self.training.ranks.is_main and minutes > 0 and time.monotonic() - self.last_save > minutes * 60)

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        every = self.training.recipe.train.checkpoint.every_steps
        due = votes > 0 or step.last or bool(every and self.training.state.step % every == 0)
        if due or wishes.save or wishes.stop:
            self._save(wishes.best)
        return {}

    def _save(self, best: bool) -> None:
        training = self.training
        with training.phases.during("checkpoint"):
            self._write(best)
        self.last_save = time.monotonic()

    def _write(self, best: bool) -> None:
        training = self.training
        path = save(training.engine, training.stage, training.run_dir, training.resolved, training.state)
        if best:
            mark_best(training.run_dir, path)
        prune(training.run_dir, training.recipe.train.checkpoint.keep)
