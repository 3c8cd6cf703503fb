"""The documents of packs: one array of token ids per pack, put in order and checked for many packs at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from isal.isal_zlib import crc32  # the CRC-32 of zlib at ten times its speed
from numpy.typing import NDArray

from shards.access import Bytes
from shards.checksums import Joiner
from shards.spans import Ints

TOKEN_TYPES: dict[int, str] = {2: "<u2", 4: "<u4"}
Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Pack:
    """Documents one after another, or parts of documents."""

    ids: Tokens
    """[tokens] uint16 or uint32, as stored; read-only."""
    lengths: Ints
    """[documents] tokens of each."""

    def documents(self) -> list[Tokens]:
        """The token ids of every document, as views."""
        return _slices(self.ids, self.lengths)


def packs_of(ids: Tokens, lengths: Ints, starts: Ints) -> list[Pack]:
    """Packs, as views of one array of their documents.

    Args:
        ids: the documents one after another.
        lengths: tokens of each.
        starts: [packs + 1] number of the first document of every pack.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])[starts].tolist()
    bounds = starts.tolist()
    rows = zip(ends[:-1], ends[1:], bounds[:-1], bounds[1:], strict=True)
    return [Pack(ids[begin:end], lengths[first:last]) for begin, end, first, last in rows]


def in_order(data: Bytes, begins: Ints, sizes: Ints, width: int) -> Bytes:
    """The ranges of the bytes one after another; no copy where they lie so already. ``width``: a divisor of sizes."""
    if len(data) % width or (begins % width).any():
        return np.frombuffer(b"".join(data.data[b : b + s] for b, s in _pairs(begins, sizes)), dtype=np.uint8)
    counts, firsts = sizes // width, begins // width
    ends = np.cumsum(counts)
    shifts = firsts - ends + counts
    if not shifts.any():
        return data[: int(ends[-1]) * width]
    places = np.repeat(shifts, counts)
    places += np.arange(len(places))
    found: Bytes = data.view(f"<u{width}").take(places).view(np.uint8)
    found.flags.writeable = False
    return found


def as_tokens(ordered: Bytes, sizes: Ints, widths: Ints) -> Tokens:
    """Documents one after another as token ids, each of ``widths`` bytes."""
    width = int(widths[0])
    if (widths == width).all():
        return ordered.view(TOKEN_TYPES[width])
    parts = zip(_slices(ordered, sizes), widths.tolist(), strict=True)
    return np.concatenate([np.frombuffer(part, TOKEN_TYPES[width]) for part, width in parts])


def intact(joiner: Joiner, ordered: Bytes, sizes: Ints, crcs: Ints, starts: Ints) -> NDArray[np.bool_]:
    """[packs] which packs hold the bytes their CRC-32s promise.

    A pack is checked in one pass against what the CRC-32s of its documents give together.

    Args:
        joiner: joins them.
        ordered: the documents one after another.
        sizes: bytes of each.
        crcs: CRC-32 of each; -1 = unknown.
        starts: [packs] number of the first document of every pack.
    """
    unknown = crcs < 0
    first = unknown.copy()
    first[1:] |= unknown[:-1]
    first[starts] = True
    runs = np.flatnonzero(first)
    bounds = np.append(np.cumsum(sizes)[runs] - sizes[runs], sizes.sum()).tolist()
    parts = map(ordered.data.__getitem__, map(slice, bounds[:-1], bounds[1:]))
    found = np.fromiter(map(crc32, parts), dtype=np.int64, count=len(runs))
    wrong = (found != joiner.runs(crcs, sizes, runs)) & ~unknown[runs]
    good = np.ones(len(starts), dtype=bool)
    good[starts.searchsorted(runs[wrong], side="right") - 1] = False
    return good


def _slices(values: NDArray[Any], lengths: Ints) -> list[Any]:
    ends = np.cumsum(lengths)
    return list(map(values.__getitem__, map(slice, (ends - lengths).tolist(), ends.tolist())))


def _pairs(begins: Ints, sizes: Ints) -> Iterable[tuple[int, int]]:
    return zip(begins.tolist(), sizes.tolist(), strict=True)
