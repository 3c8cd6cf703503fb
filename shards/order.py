"""The order of an epoch: seeded block shuffle, mixing of weighted sources, no equal texts close together.

Everything here is a pure function of integers. Random numbers are raw Philox output ranked by a stable sort, and not
``Generator.permutation``: NumPy keeps the raw stream fixed for ever but may change what its generators make of it,
and an order that changes with a NumPy upgrade would break every resume.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

BLOCK = 32
"""Neighbours that stay together on disk: large enough that cold reads run at about sequential speed."""
LANES = 64
"""Blocks far apart that are read side by side."""
WINDOW = 256
"""Samples of one lane that are mixed: 64 lanes x 256 samples are the reach of the shuffle."""
FULL_SHUFFLE_BELOW = 4096
"""Smaller sets fit in memory many times over: a full permutation costs nothing."""

_BLOCKS, _LANES, _FIXED_BLOCKS, _FIXED_LANES, _GROUPS = range(1, 6)  # first word of every seed: independent streams


def raw_keys(count: int, *identity: int) -> NDArray[np.uint64]:
    """``count`` random 64-bit keys for these non-negative integers; the same on every machine."""
    return np.asarray(np.random.Philox(np.random.SeedSequence(identity)).random_raw(count), dtype=np.uint64)


def permutation(count: int, *identity: int) -> Ints:
    """A seeded permutation of ``range(count)``."""
    return np.argsort(raw_keys(count, *identity), kind="stable").astype(np.int64)


def shuffle_windows(windows: Ints, *identity: int) -> Ints:
    """Positions reordered inside runs of equal ``windows`` (non-decreasing window numbers)."""
    keys = windows.astype(np.uint64) << np.uint64(40) | raw_keys(len(windows), *identity) >> np.uint64(24)
    return np.argsort(keys, kind="stable").astype(np.int64)


def local_shuffle(count: int, *identity: int, streams: tuple[int, int] = (_BLOCKS, _LANES)) -> Ints:
    """``range(count)`` shuffled so that neighbours part while reads stay local.

    Blocks of 32 neighbours are permuted and dealt to 64 lanes, each lane is shuffled inside windows of 256, and the
    lanes are read in turn. Below 4096 samples it is a plain permutation.
    """
    if count < FULL_SHUFFLE_BELOW:
        return permutation(count, streams[0], *identity)
    blocks = permutation(-(-count // BLOCK), streams[0], *identity)
    members = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    rows = -(-count // LANES)
    lanes = np.full(LANES * rows, -1, dtype=np.int64)
    lanes[:count] = members[members < count]
    window = np.arange(LANES * rows, dtype=np.int64)
    window = (window // rows) * (-(-rows // WINDOW)) + window % rows // WINDOW
    lanes = lanes[shuffle_windows(window, streams[1], *identity)]
    mixed = lanes.reshape(LANES, rows).T.ravel()
    return mixed[mixed >= 0]


def source_pass(count: int, weight: float, seed: int, epoch: int, source: int, shuffle: bool = True) -> Ints:
    """The samples one source contributes to an epoch: ``floor(weight)`` full passes and a fraction of one more.

    The fraction is a window that moves through a fixed order of blocks from epoch to epoch, so weight 0.5 shows every
    sample once in two epochs. A weight below one contributes at least one sample.
    """
    whole = int(weight)
    rest = min(count, max(round((weight - whole) * count), 0 if whole else 1))
    parts = [
        local_shuffle(count, seed, epoch, source, number) if shuffle else np.arange(count, dtype=np.int64)
        for number in range(whole)
    ]
    if rest:
        if shuffle:
            fixed = local_shuffle(count, seed, source, streams=(_FIXED_BLOCKS, _FIXED_LANES))
            chosen = np.sort(np.take(fixed, np.arange(epoch * rest, (epoch + 1) * rest), mode="wrap"))
            parts.append(chosen[local_shuffle(rest, seed, epoch, source, whole)])
        else:
            parts.append(np.arange(rest, dtype=np.int64))
    return np.concatenate(parts)


def epoch_order(counts: Sequence[int], weights: Sequence[float], seed: int, epoch: int, shuffle: bool = True) -> Ints:
    """Global sample numbers of one epoch: every source's passes, spread evenly over the epoch.

    Sample numbers run through the sources one after another. Without ``shuffle`` the sources follow one another in
    index order.
    """
    firsts = np.concatenate([[0], np.cumsum(counts)])
    passes = [
        source_pass(count, weight, seed, epoch, source, shuffle) + firsts[source]
        for source, (count, weight) in enumerate(zip(counts, weights, strict=True))
    ]
    merged = np.concatenate(passes)
    if not shuffle or len(passes) == 1:
        return merged
    position = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in passes])
    return merged[np.argsort(position, kind="stable")]


def shuffle_groups(windows: Ints, seed: int, epoch: int) -> Ints:
    """Order of length-sorted groups: mixed inside the window they were sorted in, which keeps reads local."""
    return shuffle_windows(windows, _GROUPS, seed, epoch)


def tag_items(starts: Ints, hashes: Ints) -> list[tuple[int, ...]]:
    """Per item the texts that also occur elsewhere in the epoch (small numbers); all other texts cannot collide."""
    _, text, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    repeated = (counts[text] > 1).nonzero()[0]
    tags: list[tuple[int, ...]] = [()] * (len(starts) - 1)
    owner = np.searchsorted(starts, repeated, side="right") - 1
    for item, number in zip(owner.tolist(), text[repeated].tolist(), strict=True):
        tags[item] = (*tags[item], number)
    return tags


def spread_texts(tags: Sequence[tuple[int, ...]], distance: int) -> tuple[Ints, int]:
    """Reorder items so that any ``distance`` consecutive ones share no text; returns (order, items left in conflict).

    An item that would come too soon waits until its texts are far enough back. What still waits at the end is inserted
    where the order has room for it: an insertion only moves other items apart. What fits nowhere keeps its place.
    """
    if not any(tags):
        return np.arange(len(tags), dtype=np.int64), 0
    ready: dict[int, int] = {}  # text -> first position at which it may come again
    order: list[int] = []
    waiting: list[tuple[int, int]] = []
    for item in range(len(tags)):
        while waiting and waiting[0][0] <= len(order):
            _place(heapq.heappop(waiting)[1], tags, ready, order, waiting, distance)
        if tags[item]:
            _place(item, tags, ready, order, waiting, distance)
        else:
            order.append(item)
    while waiting and waiting[0][0] <= len(order):
        _place(heapq.heappop(waiting)[1], tags, ready, order, waiting, distance)
    left = sorted(item for _, item in waiting)
    points, stuck = _gaps(order, left, tags, distance)
    return np.insert(np.asarray(order, dtype=np.int64), points, left), stuck


def _place(
    item: int,
    tags: Sequence[tuple[int, ...]],
    ready: dict[int, int],
    order: list[int],
    waiting: list[tuple[int, int]],
    distance: int,
) -> None:
    earliest = max((ready.get(text, 0) for text in tags[item]), default=0)
    if earliest > len(order):
        heapq.heappush(waiting, (earliest, item))
        return
    for text in tags[item]:
        ready[text] = len(order) + distance
    order.append(item)


def _gaps(
    order: Sequence[int], left: Sequence[int], tags: Sequence[tuple[int, ...]], distance: int
) -> tuple[list[int], int]:
    """Where in ``order`` each left-over item can be inserted; the middle of its widest gap."""
    wanted = {text for item in left for text in tags[item]}
    places: dict[int, list[int]] = {text: [] for text in wanted}
    for position, item in enumerate(order):
        for text in tags[item]:
            if text in wanted:
                places[text].append(position)
    points, stuck = [], 0
    for item in left:
        # Inserted before position p, the item is p - q away from an earlier q and q + 1 - p from a later one.
        blocked = ((q + 2 - distance, q + distance - 1) for text in tags[item] for q in places[text])
        point = _widest_gap(blocked, len(order))
        if point is None:
            point, stuck = min(item, len(order)), stuck + 1
        points.append(point)
        for text in tags[item]:
            places[text].append(point)
    return points, stuck


def _widest_gap(blocked: Iterable[tuple[int, int]], end: int) -> int | None:
    """Middle of the longest run of ``0..end`` outside the closed intervals ``blocked``; None when there is none."""
    best_length, best, free = 0, None, 0
    for low, high in sorted([*blocked, (end + 1, end + 1)]):
        if low - free > best_length:
            best_length, best = low - free, (free + low - 1) // 2
        free = max(free, high + 1)
    return best
