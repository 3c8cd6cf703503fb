"""The order of a source: an endless stream of shuffled passes, any range of which can be computed on its own.

Everything here is a pure function of integers. Random numbers are raw Philox output ranked by a stable sort, and not
``Generator.permutation``: NumPy keeps the raw stream fixed for ever but may change what its generators make of it,
and an order that changes with a NumPy upgrade would break every resume.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

BLOCK = 32
"""Neighbours that stay together on disk: large enough that cold reads run at about sequential speed."""
LANES = 64
"""Blocks far apart that are read side by side."""
WINDOW = 256
"""Samples of one lane that are mixed: 64 lanes x 256 samples are the reach of the shuffle."""
FULL_SHUFFLE_BELOW = LANES * WINDOW
"""Smaller sets lie within the reach anyway, and in memory: a full permutation mixes them better and costs nothing."""

_BLOCKS, _WINDOWS, _GROUPS = range(1, 4)  # first word of every seed: independent streams
_LAST = 2**64 - 1


def raw_keys(count: int, *identity: int) -> NDArray[np.uint64]:
    """``count`` random 64-bit keys for these non-negative integers; the same on every machine."""
    return np.asarray(np.random.Philox(np.random.SeedSequence(identity)).random_raw(count), dtype=np.uint64)


def permutation(count: int, *identity: int) -> Ints:
    """A seeded permutation of ``range(count)``."""
    return np.argsort(raw_keys(count, *identity), kind="stable").astype(np.int64)


class Stream:
    """A source's samples for ever: pass after pass, each in an order of its own.

    A pass of fewer than 16 384 samples is a plain permutation. In a larger one, neighbours part while reads stay local:
    blocks of 32 neighbours are permuted, the result is cut into 64 lanes, each lane is shuffled inside windows of 256,
    and the lanes are read in turn. What a range costs is the range, rounded to whole windows (16 384 samples), and the
    permutation of the pass's blocks, which is kept.

    Args:
        count: samples of the source.
        seed: seed of the run.
        source: number of the source in the plan.
        shuffle: False keeps the order of the index.
    """

    def __init__(self, count: int, seed: int, source: int, shuffle: bool = True) -> None:
        self.count, self.seed, self.source, self.shuffle = count, seed, source, shuffle
        self._blocks = lru_cache(maxsize=2)(self._make_blocks)
        self._whole = lru_cache(maxsize=2)(self._make_whole)

    def take(self, begin: int, end: int) -> Ints:
        """Samples at the positions ``[begin, end)`` of the stream; position ``p`` lies in pass ``p // count``."""
        parts = []
        while begin < end:
            number, first = divmod(begin, self.count)
            last = min(self.count, first + end - begin)
            parts.append(self._pass(number, first, last))
            begin += last - first
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _pass(self, number: int, first: int, last: int) -> Ints:
        if not self.shuffle:
            return np.arange(first, last, dtype=np.int64)
        if self.count < FULL_SHUFFLE_BELOW:
            return self._whole(number)[first:last]
        reach = LANES * WINDOW
        windows = range(first // reach, -(-last // reach))
        mixed = np.concatenate([self._window(number, window) for window in windows])
        return mixed[first - windows.start * reach : last - windows.start * reach]

    def _window(self, number: int, window: int) -> Ints:
        """Samples of one window of all lanes, the lanes in turn."""
        rows, longer = divmod(self.count, LANES)  # the first lanes hold one sample more
        first = window * WINDOW
        height = min(WINDOW, rows + (longer > 0) - first)
        keys = raw_keys(LANES * height, _WINDOWS, self.seed, self.source, number, window).reshape(LANES, height)
        if first + height > rows:
            keys[longer:, -1] = _LAST  # the row the shorter lanes do not have: it stays last and is cut off
        lanes = np.arange(LANES, dtype=np.int64)
        begins = lanes * rows + np.minimum(lanes, longer) + first
        places = begins[:, None] + np.argsort(keys, axis=1, kind="stable")
        return self._samples(number, places.T.ravel()[: self.count - first * LANES])

    def _samples(self, number: int, places: Ints) -> Ints:
        """What lies at these places of the permuted blocks."""
        blocks, short, gap = self._blocks(number)
        places = places + np.where(places >= short, gap, 0)
        return blocks[places // BLOCK] * np.int64(BLOCK) + places % BLOCK

    def _make_blocks(self, number: int) -> tuple[NDArray[np.int32], int, int]:
        """The permuted blocks, where the incomplete one among them ends, and how much it lacks."""
        count = -(-self.count // BLOCK)
        blocks = permutation(count, _BLOCKS, self.seed, self.source, number).astype(np.int32)
        lacking = -self.count % BLOCK
        incomplete = int((blocks == count - 1).argmax())
        return blocks, (incomplete + 1) * BLOCK - lacking, lacking

    def _make_whole(self, number: int) -> Ints:
        return permutation(self.count, _BLOCKS, self.seed, self.source, number)


def shuffle_groups(windows: Ints, *identity: int) -> Ints:
    """Order of length-sorted groups: mixed inside the window they were sorted in, which keeps reads local.

    Args:
        windows: [n] window of each group, non-decreasing.
        identity: seed, epoch and chunk.
    """
    keys = windows.astype(np.uint64) << np.uint64(40) | raw_keys(len(windows), _GROUPS, *identity) >> np.uint64(24)
    return np.argsort(keys, kind="stable").astype(np.int64)
