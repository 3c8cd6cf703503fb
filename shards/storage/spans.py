"""Merges many ranges of shards into few spans: ranges close to each other are read together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

LONGEST_SPAN = 16 << 20
_SHARD = 1 << 44  # bytes; no shard is longer


class Spans(NamedTuple):
    """What to read, and where each range begins in the joined bytes."""

    shards: Ints
    offsets: Ints
    sizes: Ints
    begins: Ints
    """[ranges] position of every range in the joined spans."""


def merge(shards: Ints, offsets: Ints, sizes: Ints, gap: int) -> Spans:
    """Ranges in any order as few spans, sorted by address; neighbours at most ``gap`` bytes apart are read together."""
    addresses = shards * _SHARD + offsets
    order = np.argsort(addresses, kind="stable")  # quick when they are sorted already
    sorted_shards, begins, addresses = shards[order], offsets[order], addresses[order]
    ends = begins + sizes[order]
    reach = np.maximum.accumulate(addresses + sizes[order])  # overlapping ranges may end before earlier ones
    starts = np.empty(len(order), dtype=bool)
    starts[:1] = True
    starts[1:] = addresses[1:] > reach[:-1] + gap
    starts[1:] |= sorted_shards[1:] != sorted_shards[:-1]
    starts |= _too_long(begins, starts)
    first = np.flatnonzero(starts)
    span_ends = np.maximum.reduceat(ends, first) if len(first) else ends
    span_sizes = span_ends - begins[first]
    bases = np.cumsum(span_sizes) - span_sizes
    number = np.cumsum(starts) - 1
    placed = np.empty(len(order), dtype=np.int64)
    placed[order] = bases[number] + begins - begins[first][number]
    return Spans(sorted_shards[first], begins[first], span_sizes, placed)


def _too_long(begins: Ints, starts: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where to cut merged spans that are too long: at multiples of LONGEST_SPAN from the span's beginning."""
    first = np.flatnonzero(starts)
    block = (begins - begins[first][np.cumsum(starts) - 1]) // LONGEST_SPAN
    cut = np.zeros(len(begins), dtype=bool)
    cut[1:] = block[1:] != block[:-1]
    return cut
