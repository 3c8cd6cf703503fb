"""The documents of packs: one array of token ids per pack, put in order and checked for many packs at once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32  # the CRC-32 of zlib at ten times its speed
from numpy.typing import NDArray

from shards.format.checksums import Joiner
from shards.storage.access import Bytes
from shards.storage.spans import Ints

TOKEN_TYPES: dict[int, str] = {2: "<u2", 4: "<u4"}
_COPIED_WHOLE = 512  # bytes; longer documents are copied one by one faster than token by token
Tokens = NDArray[np.unsignedinteger[Any]]


class Pack(NamedTuple):
    """Documents one after another, or parts of documents."""

    ids: Tokens
    """[tokens] uint16 or uint32, as stored; read-only."""
    lengths: Ints
    """[documents] tokens of each."""

    def documents(self) -> list[Tokens]:
        """The token ids of every document, as views."""
        ends = np.cumsum(self.lengths)
        return cut(self.ids, ends - self.lengths, ends)


class Documents(NamedTuple):
    """Documents of packs, or parts of documents, in bytes that were read; those of a pack are neighbours."""

    data: Bytes
    begins: Ints
    """First byte of each."""
    sizes: Ints
    widths: Ints
    """Bytes per token of each: 2 or 4."""
    starts: Ints
    """[packs + 1] number of the first document of every pack."""

    def packs(self) -> list[Pack]:
        """The packs, as views of the data."""
        bounds, lengths = self.starts.tolist(), self.sizes // self.widths
        width = int(self.widths[0])
        if (self.widths != width).any() or (self.begins % width).any():
            rows = zip(cut(self.data, self.begins, self.begins + self.sizes), self.widths.tolist(), strict=True)
            documents = [np.frombuffer(part.tobytes(), TOKEN_TYPES[width]) for part, width in rows]
            ids = [np.concatenate(documents[first:last]) for first, last in pairwise(bounds)]
        else:
            whole = self.data[: len(self.data) // width * width].view(TOKEN_TYPES[width])
            firsts, lasts = self.starts[:-1], self.starts[1:] - 1
            ids = cut(whole, self.begins[firsts] // width, (self.begins + self.sizes)[lasts] // width)
        return list(map(Pack, ids, cut(lengths, self.starts[:-1], self.starts[1:])))

    def intact(self, crcs: Ints, joiner: Joiner) -> NDArray[np.bool_]:
        """[packs] which packs hold the bytes their CRC-32s (-1 = unknown) promise.

        Every pack is read once: its CRC-32 is compared with what those of its documents give together.
        """
        unknown = crcs < 0
        first = unknown.copy()
        first[1:] |= unknown[:-1]
        first[self.starts[:-1]] = True
        runs = np.flatnonzero(first)
        ends = (self.begins + self.sizes)[np.append(runs[1:], len(crcs)) - 1]
        parts = map(self.data.data.__getitem__, map(slice, self.begins[runs].tolist(), ends.tolist()))
        actual = np.fromiter(map(crc32, parts), dtype=np.int64, count=len(runs))
        wrong = (actual != joiner.runs(crcs, self.sizes, runs)) & ~unknown[runs]
        good = np.ones(len(self.starts) - 1, dtype=bool)
        good[self.starts.searchsorted(runs[wrong], side="right") - 1] = False
        return good


def in_order(documents: Documents) -> Documents:
    """The same with the documents of a pack beside one another; as they are where packs are single documents."""
    data, begins, sizes, widths, starts = documents
    ends = np.cumsum(sizes)
    if len(starts) == len(sizes) + 1 or (begins == ends - sizes).all():
        return documents
    width = int(widths.min())
    if len(data) % width or (begins % width).any() or int(ends[-1]) > _COPIED_WHOLE * len(sizes):
        ordered = np.concatenate(cut(data, begins, begins + sizes))
    else:
        places = np.repeat((begins - ends + sizes) // width, sizes // width)
        places += np.arange(len(places))
        ordered = data.view(f"<u{width}").take(places).view(np.uint8)
    ordered.flags.writeable = False
    return Documents(ordered, ends - sizes, sizes, widths, starts)


def cut(values: NDArray[Any], begins: Ints, ends: Ints) -> list[Any]:
    """Many parts of an array, as views."""
    return list(map(values.__getitem__, map(slice, begins.tolist(), ends.tolist())))
