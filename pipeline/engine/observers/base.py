"""What happens beside the steps of a run: logs, evaluations, checkpoints, health checks.

Every rank has the same observers and calls them at the same moments in the order of `registry.OBSERVERS`. So a method
may contain collectives; it must then reach them on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.engine.sinks.base import Metrics
from pipeline.engine.training import Training
from shards.load.requests import StepBatch


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """An optimizer step that has been taken; `Training.state` counts it already."""

    batch: StepBatch
    """This rank's share, on the host."""
    valid_tokens: int
    """Of the whole global batch, like `samples`."""
    samples: int
    learning_rate: float
    sums: dict[str, torch.Tensor]
    """The stage's own sums over this rank's micro-batches (detached scalars)."""
    last: bool
    """It is the last one of the run."""


@dataclass(slots=True)
class Wishes:
    """What observers ask of those behind them and of the loop after a step; equal on every rank."""

    stop: bool = False
    """Save and end after this step."""
    save: bool = False
    """Save a checkpoint."""
    best: bool = False
    """The weights are the best so far."""


class Observer:
    """Does nothing; override what is of use.

    Per run: `on_start`, then `vote` before and `on_step` behind every step, then `on_end`, which an error leaves out.
    Metrics that a method returns are written by all sinks before the next observer has its turn.
    """

    def __init__(self, training: Training) -> None:
        self.training = training

    def on_start(self, wishes: Wishes) -> Metrics:
        """The run stands before its first step, or where it was resumed."""
        del wishes
        return {}

    def vote(self) -> int:
        """A number that this rank adds to the one all-reduce of a step; `on_step` is told the sum over all ranks."""
        return 0

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        """A step is done."""
        del step, wishes, votes
        return {}

    def on_end(self) -> None:
        """The last step of this process is done and saved, and the sinks are closed."""
