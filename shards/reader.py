"""Reads the bytes of samples: one ranged read per member, checked against the CRC-32 of the index.

Local files only; ``_open`` is the seam where object stores come in.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.packing import ELEMENT, Elements
from shards.plan import Plan, kept_frames
from shards.video import decode

_DATA_ERRNO = (errno.ENOENT, errno.EACCES, errno.EIO, errno.ESTALE, errno.EISDIR, errno.ENOTDIR)
_TOKEN_TYPES: dict[int, str] = {2: "<u2", 4: "<u4"}

Tokens = NDArray[np.unsignedinteger[Any]]


class Reader:
    """Bytes, tokens and frames of a plan's samples.

    Safe to pickle and to fork: file handles belong to the process that opened them and are never inherited.

    Args:
        plan: says where each sample lies.
        verify: compare the CRC-32 of every member that is read whole.
        open_files: shard files kept open; the one unused longest is closed.
    """

    def __init__(self, plan: Plan, verify: bool = True, open_files: int = 64) -> None:
        self.plan, self.verify, self.open_files = plan, verify, open_files
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self.plan, "verify": self.verify, "open_files": self.open_files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def close(self) -> None:
        """Close all shard files; the next read opens them again."""
        handles, self._handles = self._handles, OrderedDict()
        for handle in handles.values():
            os.close(handle)

    def __del__(self) -> None:
        if getattr(self, "_pid", None) == os.getpid():
            self.close()

    def payload(self, sample: int, start: int = 0, length: int | None = None) -> bytes:
        """Bytes ``[start, start + length)`` of a sample's payload; ``length`` None reads to its end.

        Raises DataError naming shard and key: the file is missing or too short, or the CRC-32 of the whole payload
        does not match (a part cannot be checked).
        """
        columns = self.plan.columns
        size = int(columns["size"][sample])
        wanted = size - start if length is None else length
        if start < 0 or wanted < 0 or start + wanted > size:
            raise self.error(sample, f"bytes {start}..{start + wanted} asked of a payload of {size} bytes")
        data = self._read(sample, int(self.plan.shard_of[sample]), int(columns["offset"][sample]) + start, wanted)
        if self.verify and wanted == size and zlib.crc32(data) != columns["crc32"][sample]:
            raise self.error(sample, "the bytes do not match the CRC-32 in the index")
        return data

    def meta(self, sample: int) -> dict[str, Any]:
        """The sample's ``.json`` member. Raises DataError when it is damaged, or for a text document."""
        columns = self.plan.columns
        offset = int(columns["meta_offset"][sample])
        if offset < 0:
            raise self.error(sample, "a text document has no metadata member")
        data = self._read(sample, int(self.plan.shard_of[sample]), offset, int(columns["meta_size"][sample]))
        if self.verify and zlib.crc32(data) != columns["meta_crc32"][sample]:
            raise self.error(sample, "the metadata does not match its CRC-32 in the index")
        try:
            values: dict[str, Any] = json.loads(data)
        except ValueError as problem:
            raise self.error(sample, f"the metadata is not JSON ({problem})") from problem
        return values

    def tokens(self, element: np.void) -> Tokens:
        """Token ids [length] (uint16 or uint32, as stored) of one element of a pack. Read-only."""
        return self.documents(np.asarray([element], dtype=ELEMENT))[0]

    def documents(self, item: Elements) -> list[Tokens]:
        """Token ids of every element of a pack, in order: ``tokens`` for all of them at a fraction of the cost."""
        columns, samples = self.plan.columns, item["sample"]
        sizes, counts, offsets = columns["size"][samples], columns["tokens"][samples], columns["offset"][samples]
        widths = sizes // np.maximum(counts, 1)
        wrong = ((widths != 2) & (widths != 4)) | (sizes != counts * widths)
        if wrong.any():
            first = int(np.argmax(wrong))
            what = f"{sizes[first]} bytes cannot hold {counts[first]} tokens of 2 or 4 bytes"
            raise self.error(int(samples[first]), what)
        whole = (item["length"] == counts) & self.verify
        rows = zip(
            samples.tolist(),
            self.plan.shard_of[samples].tolist(),
            (offsets + item["start"] * widths).tolist(),
            (item["length"] * widths).tolist(),
            np.where(whole, columns["crc32"][samples], -1).tolist(),
            strict=True,
        )
        return [
            np.frombuffer(data, _TOKEN_TYPES[width])
            for data, width in zip(self._read_all(list(rows)), widths.tolist(), strict=True)
        ]

    def _read_all(self, rows: list[tuple[int, int, int, int, int]]) -> list[bytes]:
        """The bytes of (sample, shard, offset, size, crc32 or -1); a plain loop, for a pack is many small reads."""
        shards = {shard: sample for sample, shard, *_ in rows}
        if len(shards) > self.open_files:  # opening one would close another
            return [data for row in rows for data in self._read_all([row])]
        handles = {shard: self._open(sample, shard) for shard, sample in shards.items()}
        found = []
        for sample, shard, offset, size, crc in rows:
            try:
                data = os.pread(handles[shard], size, offset)
            except OSError:
                data = b""
            if len(data) < size or (crc >= 0 and zlib.crc32(data) != crc):
                data = self._read(sample, shard, offset, size)  # again, now with every error explained
                if crc >= 0 and zlib.crc32(data) != crc:
                    raise self.error(sample, "the bytes do not match the CRC-32 in the index")
            found.append(data)
        return found

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
        stored = int(self.plan.columns["frames"][sample])
        return decode(
            self.payload(sample), stored, wanted_frames(stored, max_frames, frame_stride), size, self.where(sample)
        )

    def where(self, sample: int) -> str:
        """``shard:key (corpus/id)`` of a sample, for messages."""
        row = self.plan.row(sample)
        return f"{self.plan.shard_path(sample)}:{row.key} ({row.corpus}/{row.sample_id})"

    def error(self, sample: int, what: str) -> DataError:
        """A DataError that names the sample."""
        return DataError(
            what, where=self.where(sample), fix="run `slt shards lint DIR`, then copy or rebuild the shard"
        )

    def _read(self, sample: int, shard: int, offset: int, size: int) -> bytes:
        handle = self._open(sample, shard)
        try:
            data = os.pread(handle, size, offset)
            while len(data) < size:  # a network file system may deliver less than asked
                more = os.pread(handle, size - len(data), offset + len(data))
                if not more:
                    what = f"the shard is truncated: bytes {offset}..{offset + size} reach past its end"
                    raise self.error(sample, what)
                data += more
        except OSError as problem:
            raise self._explained(sample, problem) from problem
        return data

    def _open(self, sample: int, shard: int) -> int:
        """A file descriptor of this process for a shard; object stores would be fetched here."""
        if self._pid != os.getpid():
            self._handles, self._pid = OrderedDict(), os.getpid()
        handle = self._handles.get(shard)
        if handle is not None:
            self._handles.move_to_end(shard)
            return handle
        if len(self._handles) >= self.open_files:
            os.close(self._handles.popitem(last=False)[1])
        try:
            handle = self._handles[shard] = os.open(self.plan.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as problem:
            raise self._explained(sample, problem) from problem
        return handle

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
