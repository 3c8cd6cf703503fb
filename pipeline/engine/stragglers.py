"""Ranks that hold up all others: which one is slowest, and which stays slow."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

ROWS = 3
"""Rows of metrics in a row after which a rank counts as slow, or no longer."""


class Stragglers:
    """Finds ranks whose own time is above ``ratio`` times the median rank's, row after row."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.slow: set[int] = set()
        self._against: dict[int, int] = {}
        """Rank -> rows in a row that contradict what it counts as."""

    def changes(self, seconds: Sequence[float]) -> list[tuple[int, float, bool]]:
        """Ranks that count as slow, or no longer, from this row on: rank, times the median, and whether it is slow.

        Args:
            seconds: each rank's own time in the row, in rank order.
        """
        found = []
        for rank, times in enumerate(ratios(seconds)):
            contradicts = (times > self.ratio) != (rank in self.slow)
            self._against[rank] = self._against.get(rank, 0) + 1 if contradicts else 0
            if self._against[rank] == ROWS:
                self.slow ^= {rank}
                self._against[rank] = 0
                found.append((rank, times, rank in self.slow))
        return found


def ratios(seconds: Sequence[float]) -> list[float]:
    """Each rank's time over the median rank's; 1 where nothing was measured."""
    median = statistics.median(seconds)
    return [value / median if median > 0 else 1.0 for value in seconds]
