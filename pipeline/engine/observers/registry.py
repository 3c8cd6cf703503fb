"""The observers of every run, in the order of their turns; adding one is one file and one line here."""

from __future__ import annotations

from pipeline.engine.observers.attempt import Attempt
from pipeline.engine.observers.average import Average
from pipeline.engine.observers.base import Observer
from pipeline.engine.observers.early_stop import EarlyStop
from pipeline.engine.observers.evaluate import Evaluate
from pipeline.engine.observers.frozen import FrozenParts
from pipeline.engine.observers.health import Health, LossSpikes
from pipeline.engine.observers.ledger import Ledger
from pipeline.engine.observers.log import Log
from pipeline.engine.observers.save import Save
from pipeline.engine.training import Training

OBSERVERS: tuple[type[Observer], ...] = (
    FrozenParts,
    Health,  # its counts are part of the row
    Log,
    LossSpikes,  # reads the row
    Ledger,
    Average,
    Evaluate,
    EarlyStop,  # reads what was evaluated
    Attempt,
)


def observers_of(training: Training) -> list[Observer]:
    """The observers of a run, equal on every rank; `Save` is last, because any other may ask for a checkpoint."""
    kinds: tuple[type[Observer], ...] = (*OBSERVERS, Save)
    return [kind(training) for kind in kinds if kind.enabled(training.recipe)]
