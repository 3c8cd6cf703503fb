"""Rows of metrics as TensorBoard events, if `train.tensorboard` is set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config.schema import Recipe
from pipeline.engine.durable import named_if_unwritable
from pipeline.engine.sinks.base import Metrics, Sink
from pipeline.engine.training import Training


class TensorBoard(Sink):
    """Writes to ``run_dir/tensorboard``."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        from torch.utils.tensorboard import SummaryWriter

        self.folder = training.run_dir / "tensorboard"
        self._open: Callable[..., Any] = SummaryWriter
        self._continue(training.state.step)

    def _continue(self, step: int) -> None:
        with named_if_unwritable(self.folder):
            self._writer = self._open(str(self.folder), purge_step=step + 1)

    @classmethod
    def enabled(cls, recipe: Recipe) -> bool:
        return recipe.train.tensorboard

    def rolled_back(self, step: int) -> None:
        self.end()
        self._continue(step)

    def write(self, step: int, metrics: Metrics) -> None:
        with named_if_unwritable(self.folder):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        with named_if_unwritable(self.folder):
            self._writer.close()
