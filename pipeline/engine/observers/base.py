"""What happens beside the steps of a run: logs, evaluations, checkpoints, health checks.

Every rank calls the same observers at the same moments, in the order of `registry.OBSERVERS`. So a method may contain
collectives, if it reaches them on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from pipeline.config.schema import Recipe
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.training import Training
from shards.load.requests import StepBatch


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """An optimizer step that was taken; `Training.state` already counts it."""

    batch: StepBatch
    """This rank's share, on the host."""
    valid_tokens: int
    """Of the global batch, like `samples`."""
    samples: int
    learning_rate: float
    sums: dict[str, torch.Tensor]
    """The stage's own sums over this rank's micro-batches (detached scalars)."""
    last: bool
    """Whether it is the last one of the run."""
    applied: bool = True
    """False if its loss or gradients were not finite, or a spike was refused: weights and moments are as before."""
    grad_norm: float = math.nan
    """Global, before clipping; infinite if not finite."""
    part_rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates of the parts in `train.parts`."""


@dataclass(slots=True)
class Wishes:
    """What observers ask of later observers and of the loop after a step; equal on every rank."""

    stop: bool = False
    """Save and end after this step."""
    finished: bool = False
    """With ``stop``: the run has reached its end, before its last step."""
    save: bool = False
    """Save a checkpoint."""
    best: bool = False
    """The weights are the best so far."""
    rollback: str = ""
    """Why the run must return to its last good checkpoint; nothing is saved or evaluated then."""
    trouble_after: int | None = None
    """Of a rollback: the step behind which the trouble began; None = no checkpoint can hold it."""
    metrics: Metrics = field(default_factory=dict)
    """What observers with earlier turns report of this step, or of the start."""


class Observer:
    """Does nothing; override what you need.

    Per run: `on_start`, then `vote` before and `on_step` after every step, `on_rollback` after a step that led to one,
    then `on_end`, unless an error ends the run.
    All sinks write the metrics that a method returns before the next observer's turn.
    """

    def __init__(self, training: Training) -> None:
        self.training = training

    @classmethod
    def enabled(cls, recipe: Recipe) -> bool:
        """Whether the recipe asks for it."""
        del recipe
        return True

    def on_start(self, wishes: Wishes) -> Metrics:
        """Before the first step, or the first after a resume."""
        del wishes
        return {}

    def vote(self) -> int:
        """A number this rank adds to the step's one all-reduce; `on_step` gets the sum over all ranks."""
        return 0

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        """A step is done."""
        del step, wishes, votes
        return {}

    def on_rollback(self) -> None:
        """`Training.state` is that of an earlier step again, except for the data and what is only counted."""

    def on_end(self) -> None:
        """After the last step of this process is saved and the sinks are closed."""
