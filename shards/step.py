"""What one optimizer step reads: the share of a rank, the requests to its workers, the batch it gets. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shards.packing import ELEMENT, Elements
from shards.plan import Cursor
from shards.substitute import BadSample


@dataclass(frozen=True)
class LoaderOptions:
    """Which share of the global batch this process reads, and with what."""

    rank: int
    world_size: int
    global_batch: int
    """Items per step over all ranks."""
    micro_batch: int
    """Items per forward on one rank."""
    workers: int = 0
    """Processes reading ahead; 0 reads in the calling process."""
    max_bad_samples: int = 100
    """Distinct damaged samples this process replaces before it gives up."""
    prefetch: int = 2
    """Micro-batches each worker keeps ready; ``workers x prefetch`` of them occupy shared memory."""
    verify: bool = True
    """Compare the CRC-32 of every sample that is read."""
    timeout_seconds: float = 600.0
    """Longest wait for a worker before the run stops (a hung file system otherwise hangs every rank)."""

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per step and rank."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def slot_offset(self, slot: int) -> int:
        """Position in the step of this rank's first item of an accumulation slot."""
        return (slot * self.world_size + self.rank) * self.micro_batch


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This rank's share of one optimizer step."""

    micro_batches: list[dict[str, Any]]
    cursor_after: Cursor
    """Where the next step begins; the same on every rank."""
    skipped: list[BadSample]
    """Damaged samples this rank replaced in this step."""
    wait_seconds: float
    """Time the caller waited for data."""
    items: int
    """Items of the step over all ranks."""


class Request(NamedTuple):
    """A micro-batch to make: plain bytes, because small arrays are slow to pickle."""

    elements: bytes
    sizes: tuple[int, ...]
    step_end: Cursor
    first: int
    """Position of the first item in the step; spreads the substitutes of a step."""

    def items(self) -> list[Elements]:
        """The items to read."""
        elements = np.frombuffer(self.elements, dtype=ELEMENT)
        return np.split(elements, np.cumsum(self.sizes)[:-1])

    @classmethod
    def of(cls, items: list[Elements], step_end: Cursor, first: int = 0) -> Request:
        """The request for these items."""
        return cls(b"".join(item.tobytes() for item in items), tuple(map(len, items)), step_end, first)
