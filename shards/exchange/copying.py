"""Copies samples from one shard set into a new one: byte for byte, verified, complete or absent."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.errors import DataError, OptionError
from shards.format.index import ShardSet, fingerprint, rows_to_table, write_index
from shards.format.opening import media_type
from shards.format.verify import verify
from shards.format.writer import MemberLocation, TarWriter, add_documents, dump_json, shard_key
from shards.schema import ANNOTATION, IndexRow, Manifest, Segment
from shards.storage.store import Folder

Report = Callable[[int, int], None] | None
_SUFFIXES = {"video/mp4": "mp4", "video/webm": "webm", "video/x-msvideo": "avi"}
_SAMPLES_PER_SHARD, _DOCUMENTS_PER_SHARD, _TOKENS_PER_MEMBER = 256, 65536, 1_000_000


@dataclass(frozen=True)
class Source:
    """The set to copy from, opened with all columns."""

    folder: Folder
    shard_set: ShardSet

    def rows(self, numbers: Sequence[int], split: str) -> list[IndexRow]:
        """Index rows of these samples, as samples of ``split``."""
        values = self.shard_set.table.take(pa.array(numbers, pa.int64())).to_pylist()
        return [IndexRow(**(row | {"split": split})) for row in values]

    def payload(self, row: IndexRow) -> bytes:
        """A sample's payload. Raises DataError if it does not match the index."""
        return self._checked(row, row.offset, row.size, row.crc32)

    def meta(self, row: IndexRow) -> dict[str, Any]:
        """The object of the json member, or the annotation in the index if the member has another form."""
        try:
            values = json.loads(self._checked(row, row.meta_offset, row.meta_size, row.meta_crc32))
        except ValueError:
            values = None
        if isinstance(values, dict):
            return values
        return {"id": row.sample_id, **{name: getattr(row, name) for name in ANNOTATION}}

    def option(self, name: str, default: int) -> int:
        """A size that the source was built with."""
        return int(self.shard_set.manifest.options.get(name, default))

    def _checked(self, row: IndexRow, offset: int, size: int, crc32: int) -> bytes:
        data = self.folder.read_range(row.shard, offset, size)
        if zlib.crc32(data) != crc32:
            raise DataError(
                f"the bytes of {row.sample_id} do not match the CRC-32 in the index",
                where=f"{self.folder.join(row.shard)}:{row.key}",
                fix="run `slt shards lint DIR`, then copy or rebuild the shard",
            )
        return data


def write_copy(
    source: Source, out: Path, chosen: Mapping[str, list[int]], how: dict[str, Any], on_progress: Report = None
) -> Manifest:
    """Copy samples into the new shard set ``out``.

    Args:
        source: the set to copy from.
        out: new or empty folder; the copy is renamed to it after verification.
        chosen: per split of the new set, row numbers of the source in their new order.
        how: how the samples were chosen; recorded in the manifest under ``options.derived`` with the source's
            fingerprint.
        on_progress: called with (samples done, samples in all).

    Raises:
        DataError: ``out`` is not empty, the source's bytes are damaged, or the disk fails.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OptionError("the folder is not empty", where=str(out), fix="choose a new folder for the copy")
    work = out.with_name(f".{out.name}.copying")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        manifest = _fill(source, work, chosen, on_progress)
        manifest.options = {**manifest.options, "derived": {"from": source.shard_set.fingerprint, **how}}
        write_index(work, manifest.table, manifest.finished())
        if problems := verify(work):
            raise DataError(f"the copy is damaged: {problems[0]}", where=str(work), fix="check the disk and try again")
        work.rename(out)
    except OSError as error:
        raise DataError(f"cannot write the copy ({error.strerror})", where=str(out), fix="check the disk") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest.finished()


@dataclass
class _Copied:
    """The shards and rows written so far."""

    source: Manifest
    options: dict[str, Any]
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: list[IndexRow] = dataclasses.field(default_factory=list)

    @property
    def table(self) -> pa.Table:
        return rows_to_table(self.rows)

    def finished(self) -> Manifest:
        splits = dict(sorted(collections.Counter(row.split for row in self.rows).items()))
        return Manifest(
            self.source.kind,
            shards=self.shards,
            splits=splits,
            counts={"samples": len(self.rows), "skipped": 0},
            options=self.options,
            versions=self.source.versions,
            fingerprint=fingerprint(self.shards, self.table),
        )


def _fill(source: Source, work: Path, chosen: Mapping[str, list[int]], on_progress: Report) -> _Copied:
    manifest = source.shard_set.manifest
    copied = _Copied(manifest, manifest.options)
    text = manifest.kind == "text"
    size = source.option("samples_per_shard", _SAMPLES_PER_SHARD)
    if text:
        size = source.option("documents_per_shard", _DOCUMENTS_PER_SHARD)
    total = sum(map(len, chosen.values()))
    for split, numbers in chosen.items():
        for shard, start in enumerate(range(0, len(numbers), size)):
            rows = source.rows(numbers[start : start + size], split)
            with TarWriter(work / f"{split}-{shard:06d}.tar") as tar:
                for written in _documents(source, tar, rows) if text else _media(source, tar, rows):
                    copied.rows += written
                    if on_progress is not None:
                        on_progress(len(copied.rows), total)
            entry = {"name": tar.path.name, "samples": len(rows), "size": tar.size, "sha256": tar.digest.hexdigest()}
            copied.shards.append(entry)
    return copied


def _media(source: Source, tar: TarWriter, rows: list[IndexRow]) -> Iterator[list[IndexRow]]:
    """Videos or features, one by one."""
    features = source.shard_set.manifest.kind == "features"
    keys: set[str] = set()
    for row in rows:
        payload = source.payload(row)
        key = shard_key(row.key)
        key = key if key not in keys else shard_key(f"{row.corpus}/{row.sample_id}")
        keys.add(key)
        media = _array(tar, key, row, payload) if features else _video(tar, key, payload)
        values = {**source.meta(row), "split": row.split} if row.meta_offset >= 0 else {"split": row.split}
        meta = tar.add(f"{key}.json", dump_json(values))
        place: dict[str, Any] = {
            "shard": tar.path.name,
            "key": key,
            "offset": media.offset,
            "size": media.size,
            "crc32": media.crc32,
        }
        place |= {"meta_offset": meta.offset, "meta_size": meta.size, "meta_crc32": meta.crc32}
        yield [row._replace(**place)]


def _video(tar: TarWriter, key: str, payload: bytes) -> MemberLocation:
    return tar.add(f"{key}.{_SUFFIXES[media_type(payload[:64])]}", payload)


def _array(tar: TarWriter, key: str, row: IndexRow, payload: bytes) -> MemberLocation:
    """Features: the index addresses the data inside an ``.npy`` member."""
    buffer = io.BytesIO()
    views = np.frombuffer(payload, "<f2").reshape(-1, row.frames, row.width)
    values = views if len(views) > 1 else views[0]
    np.lib.format.write_array(buffer, values, version=(1, 0), allow_pickle=False)
    member = tar.add(f"{key}.npy", buffer.getvalue())
    return MemberLocation(member.offset + member.size - len(payload), len(payload), zlib.crc32(payload))


def _documents(source: Source, tar: TarWriter, rows: list[IndexRow]) -> Iterator[list[IndexRow]]:
    """Documents, joined into members of about as many tokens as the source's."""
    most, numbers = source.option("tokens_per_member", _TOKENS_PER_MEMBER), itertools.count()
    waiting: list[IndexRow] = []
    tokens = 0
    for row in rows:
        waiting.append(row)
        tokens += row.tokens
        if tokens >= most or row is rows[-1]:
            key = f"{tar.path.stem}-{next(numbers):04d}"
            segments = [
                Segment(item.corpus, item.sample_id, item.split, item.text, None, item.language, item.sign_language,
                        item.signer, item.gloss)
                for item in waiting
            ]  # fmt: skip
            ids = [np.frombuffer(source.payload(item), f"<u{item.size // max(1, item.tokens)}") for item in waiting]
            yield add_documents(tar, key, segments, ids)
            waiting, tokens = [], 0
