"""Writing one shard: a plain WebDataset tar with known byte offsets, the same bytes every time.

Headers are ustar with mtime, uid and gid 0. Keys hold no dot, because WebDataset cuts a name at its first one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from shards.errors import DataError
from shards.index import sync
from shards.schema import IndexRow, Segment, text_hash
from shards.tar import BLOCK
from shards.video import VideoInfo

_KEY_CHARACTERS = 64
_RECORD = tarfile.RECORDSIZE  # archives are padded to whole records, as tar itself does


def shard_key(sample_id: str) -> str:
    """A WebDataset key for any sample id: letters, digits, ``_`` and ``-``; a changed id gets a hash to stay unique."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", sample_id)[:_KEY_CHARACTERS]
    if safe == sample_id and not safe.startswith("-"):
        return safe
    return f"{safe.lstrip('-')}-{hashlib.blake2b(sample_id.encode(), digest_size=6).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Written:
    """Where a member's payload lies."""

    offset: int
    size: int
    crc32: int


class TarWriter:
    """Append members to ``<path>.tmp``; leaving the context closes the tar, syncs it and gives it its final name.

    An exception inside the context removes the partial file instead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".tmp")
        self.digest = hashlib.sha256()
        self.size = 0
        self._names: set[str] = set()
        self._handle: BinaryIO | None = None

    def __enter__(self) -> TarWriter:
        self._handle = self.partial.open("wb", buffering=1 << 20)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        handle = self._handle
        assert handle is not None
        try:
            if kind is None:
                self._put(b"\0" * (2 * BLOCK))
                self._put(b"\0" * (-self.size % _RECORD))
                sync(handle)
                handle.close()
                self.partial.rename(self.path)
        finally:
            with contextlib.suppress(OSError):  # a full disk fails again here; the first error is reported
                handle.close()
            self.partial.unlink(missing_ok=True)

    def add(self, name: str, payload: bytes) -> Written:
        """Append one file. Raises DataError for a name that is already in this shard."""
        if name in self._names:
            raise DataError(f"two members named {name}", where=self.path.name, fix="give every sample an id of its own")
        self._names.add(name)
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode, info.uname, info.gname = len(payload), 0, 0o644, "", ""
        self._put(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
        offset = self.size
        self._put(payload)
        self._put(b"\0" * (-len(payload) % BLOCK))
        return Written(offset, len(payload), zlib.crc32(payload))

    def _put(self, data: bytes) -> None:
        assert self._handle is not None
        self._handle.write(data)
        self.digest.update(data)
        self.size += len(data)


def _row(segment: Segment, shard: str, key: str, payload: Written, meta: Written, **values: Any) -> IndexRow:
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
    names = ("split", "corpus", "text", "language", "sign_language", "signer", "gloss")
    return {name: getattr(segment, name) for name in names}


def dump_json(values: dict[str, Any]) -> bytes:
    """Canonical JSON of a member: sorted keys, UTF-8, no spaces."""
    return json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def add_video(tar: TarWriter, segment: Segment, payload: bytes, info: VideoInfo) -> IndexRow:
    """Append ``<key>.mp4`` and ``<key>.json`` and return the sample's index row."""
    key = shard_key(segment.id)
    stored = {"frames": info.frames, "fps": info.fps, "width": info.width, "height": info.height}
    stored["duration_seconds"] = info.frames / info.fps
    video = tar.add(f"{key}.mp4", payload)
    meta = tar.add(f"{key}.json", dump_json({"id": segment.id, **_annotation(segment), **stored}))
    return _row(segment, tar.path.name, key, video, meta, **stored)


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
        part = Written(member.offset + begin, ids.nbytes, zlib.crc32(payload[begin : begin + ids.nbytes]))
        rows.append(_row(segment, tar.path.name, key, part, Written(-1, 0, 0), tokens=len(ids)))
    return rows
