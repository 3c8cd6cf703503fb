"""What people see of a run: a progress bar or lines, and the few held-out metrics that matter."""

from __future__ import annotations

import logging

from pipeline.engine.metrics import describe
from pipeline.engine.progress import Progress
from pipeline.engine.sinks.base import Metrics, Sink
from pipeline.engine.training import Training

logger = logging.getLogger(__name__)


class Console(Sink):
    """Shows training rows in the progress bar, evaluation rows as a line."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        done = training.state.step
        self.progress = Progress(training.recipe.name, training.total_steps, done)

    def write(self, step: int, metrics: Metrics) -> None:
        if "train/loss" in metrics:
            self.progress.update(step, metrics)
        elif any(name.startswith("eval/") for name in metrics):
            shown = {name: value for name, value in metrics.items() if name in self.training.stage.headline}
            logger.info("%s step %d  held-out: %s", self.training.recipe.name, step, describe(shown))

    def end(self) -> None:
        self.close()

    def close(self) -> None:
        self.progress.close()
