"""What one optimizer step reads: the share of a rank, the requests to its workers, the batch it gets. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shards.load.substitute import BadSample
from shards.order.items import ELEMENT, Elements, Items, as_items
from shards.order.plan import Cursor
from shards.storage.access import Remote


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
    prefetch: int = 2
    """Messages each worker keeps ready: a micro-batch each, or up to 8 small ones (20 ms of work, 1 MiB). ``workers x
    prefetch`` of them occupy shared memory."""
    verify: bool = True
    """Compare the CRC-32 of every sample that is read."""
    timeout_seconds: float = 600.0
    """Longest wait for a worker before the run stops (a hung file system otherwise hangs every rank)."""
    remote: Remote = field(default_factory=Remote)
    """How the shards of remote sets are read."""

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per step and rank."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def slot_offset(self, slot: int) -> int:
        """Position in the step of this rank's first item of an accumulation slot."""
        return (slot * self.world_size + self.rank) * self.micro_batch


class StepBatch(NamedTuple):
    """This rank's share of one optimizer step."""

    micro_batches: list[Mapping[str, Any]]
    cursor_after: Cursor
    """Where the next step begins; the same on every rank."""
    skipped: list[BadSample]
    """Damaged samples this rank replaced in this step."""
    wait_seconds: float
    """Time the caller waited for data."""
    items: int
    """Items of the step over all ranks."""
    elements: bytes = b""
    """What this rank's micro-batches were made of; read by `read`."""

    def read(self) -> list[tuple[int, int, int]]:
        """Sample, start and length (see `shards.order.items.ELEMENT`) of all that this rank read, in order; a damaged
        sample stands for its substitute."""
        found: list[tuple[int, int, int]] = np.frombuffer(self.elements, ELEMENT).tolist()
        return found


class Request(NamedTuple):
    """A micro-batch to make: plain bytes, because small arrays are slow to pickle."""

    elements: bytes
    sizes: list[int]
    """Elements of every item."""
    step_end: Cursor
    first: int
    """Position of the first item in the step; spreads the substitutes of a step."""
    showings: bool = False
    """Whether the elements say how often their samples were shown before."""

    def after(self, number: int) -> Callable[[], Cursor]:
        """Where the search for what replaces a sample of an item begins; computed when it is called."""
        end = self.step_end
        return lambda: Cursor(end.epoch, end.chunk, end.item + self.first + number)

    @classmethod
    def of(cls, items: Items | Sequence[Elements], step_end: Cursor, first: int = 0, showings: bool = False) -> Request:
        """The request for these items; ``showings``: their elements are SHOWN_ELEMENTs."""
        joined = as_items(items)
        return cls(joined.elements.tobytes(), joined.sizes().tolist(), step_end, first, showings)


def items_of(requests: Sequence[Request]) -> Items:
    """The items of all requests, one after another."""
    sizes = [size for request in requests for size in request.sizes]
    return Items.of_bytes(b"".join([request.elements for request in requests]), sizes, requests[0].showings)
