"""Random numbers that (seed, sample, showing) decide and nothing else: no process keeps a state of them.

A sample's *showing* is how often the run has shown it before, arithmetic on the plan (`SHOWN_ELEMENT`). So any number
of ranks and workers draws the same, and so does a run that resumes. Numbers are raw Philox output, as in
:mod:`shards.order.shuffle`: NumPy keeps it fixed for ever, what its generators make of it may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Purpose(IntEnum):
    """What numbers are drawn for: each has a stream of its own, so that using more of one changes no other. The values
    continue those of :mod:`shards.order.shuffle`; never give one a second meaning."""

    TIME = 16
    PICTURE = 17
    REFERENCE = 18
    VIEW = 19
    KEYPOINTS = 20
    CUES = 21
    JITTER = 22
    PLACE = 23
    CANDIDATES = 24


class Draw:
    """A stream of random numbers, its methods named as those of NumPy's generators.

    Args:
        purpose: what for.
        seed: of the plan (``plan.options.seed``).
        sample: its number in the plan.
        showing: how often the run has shown it before.
    """

    __slots__ = ("_bits",)

    def __init__(self, purpose: Purpose, seed: int, sample: int, showing: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence((int(purpose), seed, sample, showing)))

    def random(self) -> float:
        """A number in [0, 1), one of 2 ** 53."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def randoms(self, count: int) -> NDArray[np.float64]:
        """[count] of ``random``, the same that so many calls would give."""
        return np.asarray((self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53, dtype=np.float64)

    def uniform(self, low: float, high: float) -> float:
        """A number between two limits; the limit itself where they are equal."""
        return low + (high - low) * self.random()

    def integers(self, count: int) -> int:
        """One of ``range(count)``."""
        return int(self._bits.random_raw()) * count >> 64

    def choice(self, values: Sequence[T]) -> T:
        """One of some values."""
        return values[self.integers(len(values))]

    def chance(self, probability: float) -> bool:
        """True with this probability: never at 0, always at 1."""
        return self.random() < probability


def turn(purpose: Purpose, seed: int, sample: int, showing: int, count: int) -> int:
    """One of ``range(count)``: each once in every ``count`` showings of a sample, in an order drawn anew each time."""
    again, place = divmod(showing, count)
    return int(np.argsort(Draw(purpose, seed, sample, again).randoms(count), kind="stable")[place])
