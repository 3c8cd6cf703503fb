"""Ranks that are threads of this process, for losses that share a batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Meeting:
    """Collectives of ranks that are threads of this process."""

    ranks: int
    given: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.ranks, timeout=30)
        self.given = [torch.empty(0)] * self.ranks


@dataclass
class Thread:
    """One of them, as `tiles.Group`."""

    meeting: Meeting
    number: int

    def rank(self) -> int:
        return self.number

    def world_size(self) -> int:
        return self.meeting.ranks

    def host_counts(self, counts: list[int]) -> list[list[int]]:
        return [part.tolist() for part in self._all(torch.tensor(counts))]

    def gather_rows(self, local: Tensor) -> Tensor:
        return torch.cat(self._all(local))

    def scatter_sum(self, rows: Tensor) -> Tensor:
        return torch.stack(self._all(rows)).sum(0).chunk(self.meeting.ranks)[self.number]

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return torch.stack(self._all(value)).sum(0)

    def all_reduce_max(self, value: Tensor) -> Tensor:
        return torch.stack(self._all(value)).amax(0)

    def _all(self, value: Tensor) -> list[Tensor]:
        self.meeting.given[self.number] = value
        self.meeting.barrier.wait()
        everyone = [part.clone() for part in self.meeting.given]
        self.meeting.barrier.wait()
        return everyone


def mean_over_ranks(ranks: int, loss_of: Callable[[int, Thread], Tensor]) -> Tensor:
    """The mean of ``loss_of(rank, group)`` over ranks that meet."""
    meeting = Meeting(ranks)
    losses: list[Tensor] = [torch.empty(0)] * ranks

    def run(rank: int) -> None:
        losses[rank] = loss_of(rank, Thread(meeting, rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.stack(losses).mean()
