"""What takes the metrics of a run: files, services, the terminal."""

from __future__ import annotations

from pipeline.config.schema import Recipe
from pipeline.engine.training import Training

Metrics = dict[str, float]
"""Name -> value, at the run's current step."""


class Sink:
    """Takes rows of metrics. Sinks run only on rank 0: no collectives.

    Per run: `write` for every row, in the order of `registry.SINKS`, then `end` in reverse order unless an error ended
    the run, and always `close`.
    """

    def __init__(self, training: Training) -> None:
        self.training = training

    @classmethod
    def enabled(cls, recipe: Recipe) -> bool:
        """Whether the recipe asks for it."""
        del recipe
        return True

    def write(self, step: int, metrics: Metrics) -> None:
        """A row of a finished step."""

    def rolled_back(self, step: int) -> None:
        """The run stands at this step again: rows of later ones are no longer part of it."""

    def end(self) -> None:
        """There are no more rows."""

    def close(self) -> None:
        """Release resources; called after an error, too."""
