"""Reads the bytes of samples, checked against the CRC-32 of the index: local files, a node's cache, an object store."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from isal.isal_zlib import crc32  # the CRC-32 of zlib at ten times its speed
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.annotations import parse_annotation
from shards.format.checksums import Joiner
from shards.load.documents import Documents, Pack, Tokens, in_order
from shards.media.margin import margin_frames
from shards.media.square import USUAL, Placement
from shards.media.video import decode
from shards.order.items import ELEMENT, Elements, Items
from shards.order.options import kept_frames
from shards.order.plan import Plan
from shards.schema import IndexRow
from shards.storage.access import Remote, ShardBytes
from shards.storage.spans import Ints
from shards.storage.store import StoreError

_DATA_ERRNO = (errno.ENOENT, errno.EACCES, errno.EIO, errno.ESTALE, errno.EISDIR, errno.ENOTDIR)


class SampleReader(ABC):
    """Bytes, tokens and frames of a plan's samples: what a fetch function sees.

    Attributes:
        plan: says where each sample lies.
    """

    plan: Plan

    @abstractmethod
    def payload(self, sample: int) -> memoryview:
        """All bytes of a sample's payload. Raises DataError for a damaged one."""

    @abstractmethod
    def row(self, sample: int) -> IndexRow:
        """The index row of a sample, text included."""

    @abstractmethod
    def meta(self, sample: int) -> dict[str, Any]:
        """What the sample's ``.json`` or ``.txt`` member says; ``row`` holds the same and more, and reads nothing.

        Raises DataError when it is damaged, or for a text document.
        """

    @abstractmethod
    def pack(self, item: Elements) -> Pack:
        """The documents of an item, one after another. Raises DataError for a damaged one."""

    def documents(self, item: Elements) -> list[Tokens]:
        """Token ids [length] (uint16 or uint32, as stored) of every element of a pack, in order. Read-only."""
        return self.pack(item).documents()

    def tokens(self, element: np.void) -> Tokens:
        """``documents`` for one element."""
        return self.documents(np.asarray([element], dtype=ELEMENT))[0]

    def frames(
        self, sample: int, max_frames: int = 0, frame_stride: int = 1, size: int | None = None
    ) -> NDArray[np.uint8]:
        """Decoded frames [T, H, W, 3] RGB of a clip.

        Args:
            sample: number in the plan.
            max_frames: keep at most so many, evenly spread over the clip; 0 = no limit.
            frame_stride: keep every n-th stored frame, before the limit.
            size: side of the square image in pixels (short side resized, then centre crop); None = as stored.
        """
        return self.decoded(sample, wanted_frames(self.stored_frames(sample), max_frames, frame_stride), size)

    def decoded(
        self, sample: int, wanted: Sequence[int] | None, size: int | None = None, placement: Placement = USUAL
    ) -> NDArray[np.uint8]:
        """Decoded frames [T, H, W, 3] RGB of a clip, chosen by number.

        Args:
            sample: number in the plan.
            wanted: increasing numbers of the clip's frames; None = all. Where the set keeps margins, numbers below 0
                and from ``stored_frames`` on are those of the margins.
            size: as for ``frames``.
            placement: with ``size``: which square of the frames.
        """
        stored, margin = self.stored_frames(sample), self.margin_frames(sample)
        if margin:
            wanted = [number + margin for number in (range(stored) if wanted is None else wanted)]
        return decode(bytes(self.payload(sample)), stored + 2 * margin, wanted, size, self.where(sample), placement)

    def margin_frames(self, sample: int) -> int:
        """Frames that are stored before the clip, and as many after it."""
        source, _ = self.plan.samples.place(sample)
        seconds = self.plan.sources[source].shard_set.manifest.margin_seconds
        return margin_frames(seconds, self.row(sample).fps) if seconds else 0

    def stored_frames(self, sample: int) -> int:
        """Frames of a clip, or rows of its features, as the index says."""
        return int(self.plan.samples.columns["frames"][sample])

    def where(self, sample: int) -> str:
        """``shard:key (corpus/id)`` of a sample, for messages."""
        row = self.plan.samples.row(sample)
        return f"{self.plan.samples.shard_path(sample)}:{row.key} ({row.corpus}/{row.sample_id})"

    def error(self, sample: int, what: str) -> DataError:
        """A DataError that names the sample."""
        return DataError(
            what, where=self.where(sample), fix="run `slt shards lint DIR`, then copy or rebuild the shard"
        )


class Reader(SampleReader):
    """Reads each sample when it is asked for, or several together.

    Safe to pickle and to fork: file handles belong to the process that opened them and are never inherited.

    Args:
        plan: says where each sample lies.
        verify: compare the CRC-32 of every member that is read whole.
        open_files: shard files kept open; the one unused longest is closed.
        remote: how the shards of remote sets are read.
    """

    def __init__(self, plan: Plan, verify: bool = True, open_files: int = 64, remote: Remote | None = None) -> None:
        self.plan, self.verify, self.open_files, self.remote = plan, verify, open_files, remote or Remote()
        self._bytes = ShardBytes(plan.samples.shards, self.remote, open_files)
        self._joiner = Joiner()

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self.plan, "verify": self.verify, "open_files": self.open_files, "remote": self.remote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def close(self) -> None:
        """Close all shard files; the next read opens them again."""
        self._bytes.close()

    # -- members -------------------------------------------------------------------------------------------------
    def payload(self, sample: int, start: int = 0, length: int | None = None) -> memoryview:
        """Bytes ``[start, start + length)`` of a sample's payload; ``length`` None reads to its end.

        The view is cheap; ``bytes(view)`` makes a copy that can be pickled.

        Raises DataError naming shard and key: the file is missing or too short, or the CRC-32 of the whole payload
        does not match (a part cannot be checked).
        """
        columns = self.plan.samples.columns
        size = int(columns["size"][sample])
        wanted = size - start if length is None else length
        if start < 0 or wanted < 0 or start + wanted > size:
            raise self.error(sample, f"bytes {start}..{start + wanted} asked of a payload of {size} bytes")
        crc = int(columns["crc32"][sample]) if wanted == size else -1
        return self._one(sample, int(columns["offset"][sample]) + start, wanted, crc)

    def meta(self, sample: int) -> dict[str, Any]:
        columns = self.plan.samples.columns
        offset = int(columns["meta_offset"][sample])
        if offset < 0:
            raise self.error(sample, "a text document has no metadata member")
        size, crc = int(columns["meta_size"][sample]), int(columns["meta_crc32"][sample])
        data = self._one(sample, offset, size, crc, "the metadata does not match its")
        try:
            return parse_annotation(bytes(data), self.row(sample).text)
        except ValueError as problem:
            raise self.error(sample, f"the metadata {problem}") from problem

    def row(self, sample: int) -> IndexRow:
        """The index row of a sample."""
        return self.plan.samples.row(sample)

    # -- documents -----------------------------------------------------------------------------------------------
    def pack(self, item: Elements) -> Pack:
        """The documents of an item, one after another. Raises DataError for a damaged one, every error explained."""
        _, offsets, sizes, widths, crcs = self._addresses(item)
        rows = zip(item["sample"].tolist(), offsets.tolist(), sizes.tolist(), crcs.tolist(), strict=True)
        data = b"".join(self._one(sample, offset, size, crc) for sample, offset, size, crc in rows)
        starts, begins = np.asarray([0, len(item)]), np.cumsum(sizes) - sizes
        return Documents(np.frombuffer(data, dtype=np.uint8), begins, sizes, widths, starts).packs()[0]

    # -- several at once -----------------------------------------------------------------------------------------
    def payloads(self, samples: Sequence[int], most_bytes: int) -> tuple[int, dict[int, memoryview]]:
        """Payloads read together: of the first samples, as many as ``most_bytes`` hold, and at least one.

        Returns:
            How many samples were read, and the payloads of those that are intact.
        """
        places = self.plan.samples.numbers(("shard", "offset", "size", "crc32"), np.asarray(samples, dtype=np.int64))
        count = max(1, int(places[2].cumsum().searchsorted(most_bytes, side="right")))
        shards, offsets, sizes, crcs = (place[:count].tolist() for place in places)
        payloads: dict[int, memoryview] = {}
        try:
            views = self._bytes.views(shards, offsets, sizes)
            for sample, view, crc in zip(samples[:count], views, crcs, strict=True):
                if not self.verify or crc32(view) == crc:
                    payloads[sample] = view
        except StoreError:
            raise
        except (OSError, EOFError, DataError):
            pass  # whoever asks for the damaged one gets the error, the others their bytes
        return count, payloads

    def packs(self, items: Items) -> dict[bytes, Pack]:
        """The packs of all items, by the bytes of the item; an item with a damaged document is left out."""
        if not len(items):
            return {}
        try:
            shards, offsets, sizes, widths, crcs = self._addresses(items.elements)
            data, begins = self._bytes.read(shards, offsets, sizes)
        except StoreError:
            raise
        except (OSError, EOFError, DataError):
            return {}  # the damaged one is found item by item
        documents = in_order(Documents(data, begins, sizes, widths, items.starts))
        packs = dict(zip((item.tobytes() for item in items), documents.packs(), strict=True))
        if self.verify:
            for number in np.flatnonzero(~documents.intact(crcs, self._joiner)).tolist():
                packs.pop(items.item(number).tobytes(), None)
        return packs

    def _addresses(self, elements: Elements) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """Shard, offset, size, bytes per token and CRC-32 (-1 for a part of a document) of every element."""
        samples = elements["sample"]
        names = ("shard", "offset", "size", "tokens", "crc32")
        shards, offsets, sizes, counts, crcs = self.plan.samples.numbers(names, samples)
        widths = sizes // np.maximum(counts, 1)
        wrong = ((widths != 2) & (widths != 4)) | (sizes != counts * widths)
        if wrong.any():
            first = int(np.argmax(wrong))
            what = f"{sizes[first]} bytes cannot hold {counts[first]} tokens of 2 or 4 bytes"
            raise self.error(int(samples[first]), what)
        lengths = elements["length"].astype(np.int64)
        parts = lengths != counts
        if parts.any():
            crcs = np.where(parts, -1, crcs)
            offsets = offsets + elements["start"].astype(np.int64) * widths
        return shards, offsets, lengths * widths, widths, crcs

    # -- errors --------------------------------------------------------------------------------------------------
    def _one(
        self, sample: int, offset: int, size: int, crc: int, what: str = "the bytes do not match the"
    ) -> memoryview:
        """One range of a sample's shard, every error explained; -1 as CRC-32 expects nothing."""
        shard = int(self.plan.samples.shard_of[sample])
        place = (np.asarray([value], dtype=np.int64) for value in (shard, offset, size))
        shards, offsets, sizes = place
        for _ in range(2):
            try:
                view = self._bytes.read(shards, offsets, sizes)[0].data
            except EOFError:
                end = f"the shard is truncated: bytes {offset}..{offset + size} reach past its end"
                raise self.error(sample, end) from None
            except OSError as problem:
                raise self._explained(sample, problem) from problem
            if not self.verify or crc < 0 or crc32(view) == crc:
                return view
            if not self._bytes.refresh(shard):
                break
        raise self.error(sample, f"{what} CRC-32 in the index")

    def _explained(self, sample: int, problem: OSError) -> Exception:
        """A DataError for what is the data's or its storage's fault; anything else (too many open files) as it is."""
        if problem.errno in _DATA_ERRNO:
            return self.error(sample, f"cannot read the shard ({problem.strerror})")
        return problem


def wanted_frames(stored: int, max_frames: int = 0, frame_stride: int = 1) -> list[int] | None:
    """Numbers of the stored frames to keep, ascending; None keeps all. As many as ``kept_frames`` promises."""
    strided = range(0, stored, frame_stride)
    kept = int(kept_frames(stored, max_frames, frame_stride))
    if kept == stored:
        return None
    # The middle frame of each of `kept` equal parts: evenly spread for any ratio, and never the same frame twice.
    return [strided[(2 * part + 1) * len(strided) // (2 * kept)] for part in range(kept)]
