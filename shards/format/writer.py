"""Writes one shard: a plain WebDataset tar with known byte offsets, the same bytes every time.

Headers are ustar with mtime, uid and gid 0. Keys have no dots, because WebDataset cuts a name at the first dot.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from shards.errors import DataError
from shards.format.tar import BLOCK
from shards.media.video import VideoInfo
from shards.schema import ANNOTATION, MARGIN_FRAMES, IndexRow, Segment, text_hash

_KEY_CHARACTERS = 64
_RECORD = tarfile.RECORDSIZE  # archives are padded to whole records, as tar itself does
_WRITE_BYTES, _WRITE_PARTS, _SYNC_BYTES = (
    1 << 20,
    512,
    16 << 20,
)  # gathered for one writev, which takes up to 1024 parts
_MAX_WAITING = 2  # buffers waiting for a thread; more would leave the CPU cache


def shard_key(sample_id: str) -> str:
    """A WebDataset key for any sample id: letters, digits, ``_`` and ``-``; a changed id gets a hash to stay unique."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", sample_id)[:_KEY_CHARACTERS]
    if safe == sample_id and not safe.startswith("-"):
        return safe
    return f"{safe.lstrip('-')}-{hashlib.blake2b(sample_id.encode(), digest_size=6).hexdigest()}"


@dataclass(frozen=True, slots=True)
class MemberLocation:
    """Where a member's payload lies."""

    offset: int
    size: int
    crc32: int


class TarWriter:
    """Append members to ``<path>.tmp``; leaving the context closes the tar, syncs it and gives it its final name.

    Two threads write and compute the checksum a little behind the caller, without copies. Written bytes are synced
    from time to time, so that the end need not wait for all of them.
    An exception inside the context removes the partial file instead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".tmp")
        self.digest = hashlib.sha256()
        """Of the whole file; complete after the context."""
        self.size = 0
        self._names: set[str] = set()
        self._handle: FileIO | None = None
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._unsynced = 0
        self._hashing, self._writing = _BackgroundThread("tar-checksum"), _BackgroundThread("tar-write")

    def __enter__(self) -> TarWriter:
        self._handle = self.partial.open("wb", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        handle = self._handle
        assert handle is not None
        try:
            if kind is None:
                self._put(b"\0" * (2 * BLOCK))
                self._put(b"\0" * (-self.size % _RECORD))
                self._flush()
                self._writing.wait()
                self._hashing.wait()
                os.fsync(handle.fileno())
                handle.close()
                self.partial.rename(self.path)
        finally:
            self._writing.close()
            self._hashing.close()
            with contextlib.suppress(OSError):  # a full disk fails again here; the first error is reported
                handle.close()
            self.partial.unlink(missing_ok=True)

    def add(self, name: str, payload: bytes) -> MemberLocation:
        """Append one file. Raises DataError for a name that is already in this shard."""
        if name in self._names:
            raise DataError(f"two members named {name}", where=self.path.name, fix="give every sample an id of its own")
        self._names.add(name)
        self._put(_header(name, len(payload)))
        offset = self.size
        self._put(payload)
        self._put(b"\0" * (-len(payload) % BLOCK))
        return MemberLocation(offset, len(payload), crc32(payload))

    def _put(self, data: bytes) -> None:
        self._gathered.append(data)
        self.size += len(data)
        self._gathered_bytes += len(data)
        if self._gathered_bytes >= _WRITE_BYTES or len(self._gathered) >= _WRITE_PARTS:
            self._flush()

    def _flush(self) -> None:
        """Pass the gathered bytes to the writing and the checksum thread."""
        parts, self._gathered, self._gathered_bytes = self._gathered, [], 0
        self._writing.do(self._write, parts)
        self._hashing.do(_update, self.digest, parts)

    def _write(self, parts: list[bytes]) -> None:
        """In the writing thread."""
        assert self._handle is not None
        descriptor, size = self._handle.fileno(), sum(map(len, parts))
        written = os.writev(descriptor, parts)
        if written < size:  # a signal, a limit of 2 GiB, or a full disk, which the next attempt reports
            rest = memoryview(b"".join(parts))[written:]
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        self._unsynced += size
        if self._unsynced >= _SYNC_BYTES:
            os.fdatasync(descriptor)
            self._unsynced = 0


def _header(name: str, size: int) -> bytes:
    """The header that ``tarfile`` writes for a file, without the cost of a TarInfo for plain names and sizes."""
    if len(name) >= tarfile.LENGTH_NAME or not name.isascii() or size >= 8**11:
        return _info(name, size).tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    fields = bytearray(_plain_header())
    fields[: len(name)] = name.encode()
    fields[124:135] = b"%011o" % size
    fields[148:154] = b"%06o" % (sum(fields[:148]) + sum(fields[156:]) + 8 * ord(" "))
    return bytes(fields)


@functools.lru_cache(maxsize=1)
def _plain_header() -> bytes:
    return _info("", 0).tobuf(tarfile.USTAR_FORMAT)


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uname, info.gname = size, 0, 0o644, "", ""
    return info


def _update(digest: Any, parts: list[bytes]) -> None:
    for part in parts:
        digest.update(part)


class _BackgroundThread:
    """A thread that works in order, a little behind the caller; ``do`` and ``wait`` raise its errors."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: collections.deque[Future[None]] = collections.deque()

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Submit work; wait for earlier work if too much is waiting."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._waiting.append(self._pool.submit(work, *arguments))
        while len(self._waiting) > _MAX_WAITING:
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Wait until all work is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Drop the work that has not begun."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _row(
    segment: Segment, shard: str, key: str, payload: MemberLocation, meta: MemberLocation, **values: Any
) -> IndexRow:
    stored: dict[str, Any] = {"frames": 0, "fps": 0.0, "duration_seconds": 0.0, "width": 0, "height": 0, "tokens": 0}
    annotation: dict[str, Any] = _annotation(segment)
    return IndexRow(
        shard=shard,
        key=key,
        offset=payload.offset,
        size=payload.size,
        crc32=payload.crc32,
        meta_offset=meta.offset,
        meta_size=meta.size,
        meta_crc32=meta.crc32,
        sample_id=segment.id,
        text_hash=text_hash(segment.text),
        **annotation,
        **(stored | values),
    )


def _annotation(segment: Segment) -> dict[str, str]:
    return {name: getattr(segment, name) for name in ANNOTATION}


def dump_json(values: dict[str, Any]) -> bytes:
    """Canonical JSON of a member: sorted keys, UTF-8, no spaces."""
    return _canonical().encode(values).encode()


@functools.lru_cache(maxsize=1)
def _canonical() -> json.JSONEncoder:
    return json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def add_video(
    tar: TarWriter, segment: Segment, payload: bytes, info: VideoInfo, tokens: int = 0, margin_frames: int = 0
) -> IndexRow:
    """Append ``<key>.mp4`` and ``<key>.json`` and return the sample's index row.

    Args:
        info: of the clip, without margins.
        tokens: of the text.
        margin_frames: that the payload holds before the clip, and after it.
    """
    key = shard_key(segment.id)
    stored = {"frames": info.frames, "fps": info.fps, "width": info.width, "height": info.height}
    stored["duration_seconds"] = info.frames / info.fps
    video = tar.add(f"{key}.mp4", payload)
    margin = {MARGIN_FRAMES: margin_frames} if margin_frames else {}
    meta = tar.add(f"{key}.json", dump_json({"id": segment.id, **_annotation(segment), **stored, **margin}))
    return _row(segment, tar.path.name, key, video, meta, tokens=tokens, **stored)


def add_rows(tar: TarWriter, segment: Segment, rows_TW: np.ndarray, rate: float, tokens: int = 0) -> IndexRow:
    """Append ``<key>.npy`` (float16 [T, W]) and ``<key>.json`` and return the index row, which addresses the numbers.

    Args:
        rate: rows per second.
        tokens: those of the text.
    """
    key = shard_key(segment.id)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(rows_TW), version=(1, 0), allow_pickle=False)
    payload = buffer.getvalue()
    header = len(payload) - rows_TW.nbytes
    frames, width = rows_TW.shape
    stored = {"frames": frames, "fps": rate, "duration_seconds": frames / rate, "width": width, "height": 1}
    member = tar.add(f"{key}.npy", payload)
    numbers = MemberLocation(member.offset + header, rows_TW.nbytes, crc32(payload[header:]))
    meta = tar.add(f"{key}.json", dump_json({"id": segment.id, **_annotation(segment), **stored}))
    return _row(segment, tar.path.name, key, numbers, meta, tokens=tokens, **stored)


def add_documents(
    tar: TarWriter, key: str, segments: Sequence[Segment], tokens: Sequence[np.ndarray]
) -> list[IndexRow]:
    """Append ``<key>.npy`` (all token ids of the documents, concatenated) and ``<key>.json``; one row per document.

    A row's byte range covers one document's ids inside the ``.npy`` payload.
    """
    joined = np.concatenate(tokens)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, joined, version=(1, 0), allow_pickle=False)
    payload = buffer.getvalue()
    member = tar.add(f"{key}.npy", payload)
    header = len(payload) - joined.nbytes
    starts = np.cumsum([0, *(len(ids) for ids in tokens)]).tolist()
    documents = [
        {"id": segment.id, "start": start, "tokens": len(ids)}
        | {name: value for name, value in _annotation(segment).items() if value}
        for segment, start, ids in zip(segments, starts, tokens, strict=False)
    ]
    tar.add(f"{key}.json", dump_json({"documents": documents, "dtype": joined.dtype.str}))
    rows = []
    for segment, start, ids in zip(segments, starts, tokens, strict=False):
        begin = header + start * joined.itemsize
        part = MemberLocation(member.offset + begin, ids.nbytes, crc32(payload[begin : begin + ids.nbytes]))
        rows.append(_row(segment, tar.path.name, key, part, MemberLocation(-1, 0, 0), tokens=len(ids)))
    return rows
