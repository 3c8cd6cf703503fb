"""Keeps equal texts apart: any ``distance`` consecutive items of a plan share no text, as far as that can be done.

Two steps, so that a chunk depends on no more than the chunk before it:

1. :func:`spread` orders the items of one chunk by itself.
2. :func:`join` then looks at the last ``distance - 1`` items of the chunk before, as ``spread`` left them, and moves
   what meets one of their texts too soon. It leaves the chunk's own last ``distance - 1`` items where they are: what
   ``spread`` left there is what the next chunk sees.

An item that comes too soon changes places with the nearest one that fits, first ahead, then behind, so reads stay
local. Where texts are so frequent that this finds no place, the whole chunk is ordered anew by letting items wait.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.order.shuffle import Ints

_TRIED = 256  # neighbours of a free place that are asked to change places


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of consecutive items: item ``i`` holds ``hashes[starts[i]:starts[i + 1]]``."""

    starts: Ints
    hashes: Ints

    def __len__(self) -> int:
        return len(self.starts) - 1

    def reorder(self, order: Ints) -> Texts:
        """The same items in another order."""
        sizes = np.diff(self.starts)[order]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        gather = np.repeat(self.starts[:-1][order] - starts[:-1], sizes) + np.arange(starts[-1])
        return Texts(starts, self.hashes[gather])

    def tail(self, items: int) -> Texts:
        """The last items."""
        first = max(len(self) - items, 0)
        return Texts(self.starts[first:] - self.starts[first], self.hashes[self.starts[first] :])

    def only(self, keep: NDArray[np.bool_]) -> Texts:
        """The same items with some of their texts. ``keep`` [len(hashes)]."""
        kept_before = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
        return Texts(kept_before[self.starts], self.hashes[keep])


def no_texts() -> Texts:
    """What comes before the first chunk of all."""
    return Texts(np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int64))


def spread(texts: Texts, distance: int) -> Ints:
    """An order of the items of one chunk in which equal texts are ``distance`` apart, or as many as can be."""
    texts, before = _repeated(texts, no_texts())
    board = _Board(texts, before, distance)
    stuck = board.settle(len(texts))
    if stuck and not board.hopeless(stuck):
        order, left = wait_for_texts(tag_items(texts.starts, texts.hashes), distance)
        if left < len(stuck):
            return order
    return board.order()


def join(texts: Texts, before: Texts, distance: int) -> tuple[Ints, int]:
    """The order of a chunk's items after another chunk's.

    Args:
        texts: of the chunk, in the order of :func:`spread`.
        before: of the last ``distance - 1`` items of the chunk before, in the order of :func:`spread`.
        distance: items among which no text may occur twice.

    Returns:
        the order, and how many items still share a text with one of the ``distance - 1`` items before them.
    """
    texts, before = _repeated(texts, before)
    board = _Board(texts, before, distance)
    board.settle(max(len(texts) - (distance - 1), 0))
    order = board.order()
    return order, len(_too_soon(texts.reorder(order), before, distance)[0])


def _repeated(texts: Texts, before: Texts) -> tuple[Texts, Texts]:
    """Both without the texts that occur once: those cannot meet."""
    hashes = np.concatenate([before.hashes, texts.hashes])
    by_text = np.argsort(hashes, kind="stable")
    same = np.diff(hashes[by_text]) == 0
    keep = np.zeros(len(hashes), dtype=bool)
    keep[by_text[1:][same]] = keep[by_text[:-1][same]] = True
    return texts.only(keep[len(before.hashes) :]), before.only(keep[: len(before.hashes)])


def _too_soon(texts: Texts, before: Texts, distance: int) -> tuple[Ints, Ints, Ints]:
    """Positions of the items closer than ``distance`` to an equal text before them.

    Also the entries (of ``before`` and ``texts`` together) sorted by text and position, and the sorted hashes.
    """
    hashes = np.concatenate([before.hashes, texts.hashes])
    position = np.concatenate(
        [
            np.repeat(np.arange(-len(before), 0), np.diff(before.starts)),
            np.repeat(np.arange(len(texts)), np.diff(texts.starts)),
        ]
    )
    by_text = np.argsort(hashes, kind="stable")
    hashes, position = hashes[by_text], position[by_text]
    close = (hashes[1:] == hashes[:-1]) & (np.diff(position) < distance) & (position[1:] >= 0)
    return np.unique(position[1:][close]), position, hashes


class _Board:
    """Items on positions, and where every text is. Positions below 0 are the chunk before; they do not change."""

    def __init__(self, texts: Texts, before: Texts, distance: int) -> None:
        self.texts, self.distance = texts, distance
        self._starts, self._hashes = texts.starts.tolist(), texts.hashes.tolist()
        self.offenders, self._sorted_positions, self._sorted_hashes = _too_soon(texts, before, distance)
        self._moved: dict[int, int] = {}  # position -> the item there, where that is not the same number
        self._places: dict[int, list[int]] = {}  # text -> its positions, ascending
        self._reached: dict[tuple[int, ...], int] = {}  # texts -> the search goes on from here
        self._full: set[int] = set()  # texts for which no place was found

    def settle(self, end: int) -> list[int]:
        """Moves the items that come too soon, within ``[0, end)``; returns the positions that stay in conflict."""
        stuck = []
        for position in self.offenders.tolist():
            texts = self._texts_at(position)
            if self._fits(texts, position, position):
                continue  # the one it met has moved
            if position >= end or not self._full.isdisjoint(texts) or not self._move(position, texts, end):
                stuck.append(position)
        return stuck

    def order(self) -> Ints:
        """The item on every position."""
        order = np.arange(len(self.texts), dtype=np.int64)
        if self._moved:
            order[list(self._moved)] = list(self._moved.values())
        return order

    def hopeless(self, positions: Iterable[int]) -> bool:
        """Whether one of these items has a text so frequent that no order keeps it apart."""
        most = -(-len(self.texts) // self.distance)
        return any(len(self._positions(text)) > most for position in positions for text in self._texts_at(position))

    def _move(self, position: int, texts: tuple[int, ...], end: int) -> bool:
        ahead = max(self._reached.get(texts, 0), position + 1)
        for begin, stop, step in ((ahead, end, 1), (min(position, end) - 1, -1, -1)):
            place, tries = self._free(texts, position, begin, step), 0
            while place * step < stop * step and tries < _TRIED:
                if self._fits(self._texts_at(place), position, place):
                    self._swap(position, place)
                    if step > 0:
                        self._reached[texts] = place
                    return True
                place, tries = self._free(texts, position, place + step, step), tries + 1
        self._full.update(texts)
        return False

    def _free(self, texts: tuple[int, ...], own: int, place: int, step: int) -> int:
        """The first position from ``place`` on, in steps, that is far enough from every other occurrence."""
        while (blocking := self._blocking(texts, place, own, step)) is not None:
            place = blocking + step * self.distance
        return place

    def _fits(self, texts: tuple[int, ...], place: int, own: int) -> bool:
        return self._blocking(texts, place, own, 1) is None

    def _blocking(self, texts: tuple[int, ...], place: int, own: int, step: int) -> int | None:
        """The last occurrence in this direction closer than ``distance`` to ``place``, besides the one at ``own``."""
        for text in texts:
            places = self._positions(text)
            if len(places) < 2:
                continue
            first = bisect_left(places, place - self.distance + 1)
            last = bisect_left(places, place + self.distance)
            near = [at for at in places[first:last] if at != own]
            if near:
                return near[-1] if step > 0 else near[0]
        return None

    def _texts_at(self, position: int) -> tuple[int, ...]:
        item = self._moved.get(position, position)
        return tuple(self._hashes[self._starts[item] : self._starts[item + 1]])

    def _positions(self, text: int) -> list[int]:
        if text not in self._places:
            first, last = np.searchsorted(self._sorted_hashes, [text, text + 1]).tolist()
            self._places[text] = self._sorted_positions[first:last].tolist()
        return self._places[text]

    def _swap(self, one: int, other: int) -> None:
        for old, new in ((one, other), (other, one)):
            for text in self._texts_at(old):
                places = self._positions(text)
                places.remove(old)
                insort(places, new)
        first, second = self._moved.get(one, one), self._moved.get(other, other)
        self._moved[one], self._moved[other] = second, first


def tag_items(starts: Ints, hashes: Ints) -> list[tuple[int, ...]]:
    """Per item the texts that also occur elsewhere in the epoch (small numbers); all other texts cannot collide."""
    _, text, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    repeated = (counts[text] > 1).nonzero()[0]
    tags: list[tuple[int, ...]] = [()] * (len(starts) - 1)
    owner = np.searchsorted(starts, repeated, side="right") - 1
    for item, number in zip(owner.tolist(), text[repeated].tolist(), strict=True):
        tags[item] = (*tags[item], number)
    return tags


def wait_for_texts(tags: Sequence[tuple[int, ...]], distance: int) -> tuple[Ints, int]:
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
