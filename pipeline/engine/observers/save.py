"""Checkpoints: by steps, by minutes, after the best evaluation, before a stop and at the end.

Those by steps and minutes hold no live outputs: a forward pass would be most of what they cost the training, and they
are there to resume from. The best, the last and those before a stop are the ones that are exported.
"""

from __future__ import annotations

import time

from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.saving.save import Saver
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.training import Training


class Save(Observer):
    """Saves when a checkpoint is due or asked for, and moves on the one that is being written beside the steps.

    Minutes are by rank 0's clock.
    """

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.saver = Saver(training)
        self.last_save = time.monotonic()
        self.due = False

    def on_start(self, wishes: Wishes) -> Metrics:
        if not wishes.save:
            return {}
        self.training.stop.begin()  # from here on a request to stop waits for the save
        ends = wishes.stop or self.training.state.step == self.training.total_steps
        return self._save(wishes, ends)

    def on_rollback(self) -> None:
        self._saved()

    def vote(self) -> int:
        """Whether this rank is done with the checkpoint on its way, and above that whether minutes make one due."""
        minutes = self.training.recipe.train.checkpoint.every_minutes
        due = self.training.ranks.is_main and minutes > 0 and time.monotonic() - self.last_save > minutes * 60
        return int(self.saver.done_here) + int(due) * (self.training.ranks.world_size + 1)

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        every = self.training.recipe.train.checkpoint.every_steps
        minutes_due, done = divmod(votes, self.training.ranks.world_size + 1)
        metrics: Metrics = {}
        if done == self.training.ranks.world_size:
            with self.training.phases.during("checkpoint"):
                metrics = self.saver.advance()
        if wishes.rollback:  # the checkpoint on its way is the one to return to
            with self.training.phases.during("checkpoint"):
                return metrics | self.saver.finish()
        ends = step.last or wishes.stop
        self.due = self.due or minutes_due > 0 or bool(every and self.training.state.step % every == 0)
        # amid skipped steps a checkpoint would only push out the good one to which a rollback returns
        if ends or wishes.save or (self.due and step.applied):
            metrics |= self._save(wishes, ends)
        return metrics

    def _save(self, wishes: Wishes, ends: bool) -> Metrics:
        """Args: ends: no step follows, in which it could be written."""
        with self.training.phases.during("checkpoint"):
            metrics = self.saver.begin(wishes.best, outputs=wishes.save or ends)
            if ends:
                metrics |= self.saver.finish()
        self._saved()
        return metrics

    def _saved(self) -> None:
        self.last_save, self.due = time.monotonic(), False
