"""Where a run stands: everything besides tensors that a resumed run needs."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(slots=True)
class TrainState:
    """Progress of one run; equal on every rank."""

    step: int = 0
    """Finished optimizer steps."""
    tokens_seen: int = 0
    """Label tokens over all ranks."""
    samples_seen: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    """Cursor and fingerprint of the training plan (`shards.order.plan.Plan.state`); a resumed run has the same plan."""
    bad_samples: list[int] = field(default_factory=list)
    """Plan numbers of the damaged samples met so far on any rank, each once."""
    skipped_steps: int = 0
    """Consecutive steps that were not applied: their loss or gradients were not finite, or a spike was refused."""
    skipped_total: int = 0
    """All of them, those undone by a rollback included."""
    spikes: int = 0
    """Of the gradient norm or the loss."""
    running_means: dict[str, list[float]] = field(default_factory=dict)
    """Name -> mean and steps in it (`pipeline.engine.spikes`)."""
    rollbacks: int = 0
    undone_steps: int = 0
    """Steps that rollbacks took back."""
    best: dict[str, Any] = field(default_factory=dict)
    """Best evaluation so far: metric, value, step."""
    early_stop: dict[str, Any] = field(default_factory=dict)
    """Of `train.early_stop`: metric, the value to beat, its step, and evaluations waited since."""
    evaluation_due: bool = False
    """The run was stopped before this step's evaluation ended."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        return cls(**values)


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python, numpy and torch; ranks differ, runs do not."""
    random.seed(seed * 100_003 + rank)
    np.random.seed((seed * 100_003 + rank) % 2**32)
    torch.manual_seed(seed * 100_003 + rank)


def rng_state() -> dict[str, Any]:
    """This rank's generators, as tensors and plain containers."""
    numpy_state: Any = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0),
        "numpy": [numpy_state[0], torch.from_numpy(np.asarray(numpy_state[1], dtype=np.int64)), *numpy_state[2:]],
        "python": [version, list(internal), gauss],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]):
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
