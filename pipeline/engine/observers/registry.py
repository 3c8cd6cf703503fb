"""The observers of every run, in the order in which they have their turn; adding one is one file and one line here."""

from __future__ import annotations

from pipeline.engine.observers.base import Observer
from pipeline.engine.observers.divergence import Divergence
from pipeline.engine.observers.evaluate import Evaluate
from pipeline.engine.observers.frozen import FrozenParts
from pipeline.engine.observers.log import Log
from pipeline.engine.observers.save import Save
from pipeline.engine.training import Training

OBSERVERS: tuple[type[Observer], ...] = (
    FrozenParts,
    Divergence,  # before anything is written about a step that was not applied
    Log,
    Evaluate,
)


def observers_of(training: Training) -> list[Observer]:
    """The observers of a run, the same on every rank; last the one that saves, as any may wish for a checkpoint."""
    return [kind(training) for kind in (*OBSERVERS, Save)]
