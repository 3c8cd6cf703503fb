"""Items: what a batch counts. Consecutive items of a plan in two arrays, cheap to cut, join and send to a worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.order.shuffle import Ints

ELEMENT = np.dtype([("sample", np.int64), ("start", np.int32), ("length", np.int32)])
"""One sample of an item: tokens ``[start, start + length)`` of a document, all ``length`` frames of a clip, or all
``length`` tokens of a clip with its text."""

SHOWN_ELEMENT = np.dtype([*ELEMENT.descr, ("showing", np.int32)])
"""The same with how often the run has shown the sample before: what a fetch that draws random numbers is given."""

Elements = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Items:
    """Consecutive items of a plan: item ``i`` is ``elements[starts[i]:starts[i + 1]]``."""

    starts: Ints
    """[n_items + 1]"""
    elements: Elements
    """[n_elements] of ELEMENT, or of SHOWN_ELEMENT"""
    repeated_texts: int = 0
    """Items that share a text with one of the items shortly before them, because no order avoids it."""

    @classmethod
    def of_bytes(cls, elements: bytes, sizes: Sequence[int], showings: bool = False) -> Items:
        """Items of so many elements each, whose bytes are given; ``showings``: they are SHOWN_ELEMENTs."""
        dtype = SHOWN_ELEMENT if showings else ELEMENT
        return cls(starts_of(np.asarray(sizes, dtype=np.int64)), np.frombuffer(elements, dtype=dtype))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sizes(self) -> Ints:
        """[n_items] elements of every item."""
        return self.starts[1:] - self.starts[:-1]  # np.diff takes several times as long for few items

    def __iter__(self) -> Iterator[Elements]:
        """The elements of every item, as views."""
        bounds = self.starts.tolist()
        return map(self.elements.__getitem__, map(slice, bounds[:-1], bounds[1:]))

    def item(self, number: int) -> Elements:
        """The elements of one item, as a view."""
        return self.elements[self.starts[number] : self.starts[number + 1]]

    def part(self, begin: int, end: int) -> Items:
        """The items ``[begin, end)``, as views."""
        starts = self.starts[begin : end + 1]
        return Items(starts - starts[0], self.elements[starts[0] : starts[-1]])

    def shown(self, showings: Ints) -> Items:
        """The same items with the showing of every element."""
        wide = np.empty(len(self.elements), dtype=SHOWN_ELEMENT)
        for name in ELEMENT.fields or ():
            wide[name] = self.elements[name]
        wide["showing"] = showings
        return Items(self.starts, wide, self.repeated_texts)

    def reorder(self, order: Ints, repeated_texts: int) -> Items:
        """The same items in another order."""
        sizes = self.sizes()[order]
        starts = starts_of(sizes)
        gather = np.repeat(self.starts[:-1][order] - starts[:-1], sizes) + np.arange(starts[-1])
        return Items(starts, self.elements[gather], repeated_texts)


def as_items(items: Items | Sequence[Elements]) -> Items:
    """The same items in one piece."""
    if isinstance(items, Items):
        return items
    if not items:
        return Items(starts_of(np.empty(0, dtype=np.int64)), np.empty(0, dtype=ELEMENT))
    return Items(starts_of(np.fromiter(map(len, items), dtype=np.int64, count=len(items))), np.concatenate(items))


def joined(parts: Sequence[Items]) -> Items:
    """Items one after another."""
    if len(parts) == 1:
        return parts[0]
    starts = starts_of(np.concatenate([part.sizes() for part in parts]))
    return Items(starts, np.concatenate([p.elements for p in parts]), sum(p.repeated_texts for p in parts))


def starts_of(sizes: Ints) -> Ints:
    """[n + 1] where each of ``n`` items begins, and the end."""
    starts = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


def elements_of(samples: Ints, starts: Ints | int, lengths: Ints) -> Elements:
    """[n] of ELEMENT, from its three columns."""
    elements = np.empty(len(samples), dtype=ELEMENT)
    elements["sample"], elements["start"], elements["length"] = samples, starts, lengths
    return elements


def without_showings(elements: Elements) -> Elements:
    """[n] of ELEMENT, from SHOWN_ELEMENTs."""
    return elements_of(elements["sample"], elements["start"], elements["length"])
