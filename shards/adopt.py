"""Index tars that exist already: shards made by other programs, or a shard set whose index was lost.

A sample is a video member and what describes it: a ``.json`` member, or a ``.txt`` member with the text.
"""

from __future__ import annotations

import collections
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shards.errors import DataError
from shards.index import (
    MANIFEST_NAME,
    file_sha256,
    fingerprint,
    read_manifest,
    rows_to_table,
    write_index,
)
from shards.schema import IndexRow, Manifest, text_hash
from shards.tar import Member, index_tar
from shards.video import probe

VIDEO_KINDS = frozenset({"mp4", "mkv", "webm", "mov", "avi", "m4v"})
_ANNOTATION = ("split", "corpus", "text", "language", "sign_language", "signer", "gloss")
_TEXT_FIELDS = ("text", "caption", "translation", "sentence")
_SPLIT_PREFIXES = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}


def adopt(folder: Path, corpus: str = "", on_progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Write ``index.parquet`` and ``manifest.json`` for the tars of a folder.

    Args:
        folder: holds ``*.tar``. An existing manifest is kept as far as it describes how the shards were made.
        corpus: name for samples whose json does not give one; default: the folder's name.
        on_progress: called with (shards done, shards in all).

    Raises:
        DataError: no tars, a damaged tar, a sample without video or text, or a tar whose bytes an existing manifest
            knows to be different.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError("no *.tar files", where=str(folder), fix="pass the folder that holds the shards")
    before = read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None
    rows: list[IndexRow] = []
    shards: list[dict[str, Any]] = []
    for number, path in enumerate(paths, 1):
        found = _rows(path, corpus or folder.name)
        rows += found
        size, digest = path.stat().st_size, file_sha256(path)
        shards.append({"name": path.name, "samples": len(found), "size": size, "sha256": digest})
        if on_progress is not None:
            on_progress(number, len(paths))
    if before is not None and before.shards != shards:
        changed = [new["name"] for new in shards if new not in before.shards] or ["a shard is missing"]
        raise DataError(
            f"{', '.join(changed[:3])}: not the bytes its manifest was written for",
            where=str(folder),
            fix="run `slt shards lint` to see the damage; delete manifest.json to accept the tars as they are",
        )
    kinds = {"video" if row.frames else "text" for row in rows}
    if len(kinds) > 1:
        raise DataError("video and text shards are mixed", where=str(folder), fix="put them into two folders")
    manifest = before or Manifest("video" if "video" in kinds else "text", options={"adopted": True})
    manifest.shards = shards
    manifest.splits = dict(sorted(collections.Counter(row.split for row in rows).items()))
    manifest.counts = manifest.counts or {"samples": len(rows), "skipped": 0}
    table = rows_to_table(rows)
    manifest.fingerprint = fingerprint(shards, table)
    write_index(folder, table, manifest)
    return manifest


def _rows(path: Path, corpus: str) -> list[IndexRow]:
    groups: dict[str, dict[str, Member]] = {}
    for member in index_tar(path):
        parent, _, base = member.name.rpartition("/")
        name, _, kind = base.partition(".")
        groups.setdefault(f"{parent}/{name}" if parent else name, {})[kind.lower()] = member
    rows: list[IndexRow] = []
    with path.open("rb") as handle:
        for key, members in groups.items():
            if "npy" in members and "json" in members:
                rows += _documents(handle, path, key, members)
            else:
                rows.append(_video(handle, path, key, members, corpus))
    return rows


def _read(handle: BinaryIO, member: Member) -> bytes:
    handle.seek(member.offset)
    return handle.read(member.size)


def _parse(handle: BinaryIO, path: Path, key: str, member: Member) -> dict[str, Any]:
    try:
        return dict(json.loads(_read(handle, member)))
    except (ValueError, TypeError) as error:
        where = f"{path.name}:{key}"
        raise DataError(f"{member.name} is no JSON object ({error})", where=where, fix="repair it") from None


def _documents(handle: BinaryIO, path: Path, key: str, members: dict[str, Member]) -> list[IndexRow]:
    """Rows of the documents of one token member, from the starts that its json member lists."""
    meta = _parse(handle, path, key, members["json"])
    payload = _read(handle, members["npy"])
    try:
        ids = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
        header, width = len(payload) - ids.nbytes, ids.itemsize
        rows = []
        for document in meta["documents"]:
            begin, size = header + document["start"] * width, document["tokens"] * width
            values: dict[str, Any] = {name: str(document.get(name, "")) for name in _ANNOTATION}
            rows.append(
                IndexRow(
                    shard=path.name,
                    key=key,
                    offset=members["npy"].offset + begin,
                    size=size,
                    crc32=zlib.crc32(payload[begin : begin + size]),
                    meta_offset=-1,
                    meta_size=0,
                    meta_crc32=0,
                    sample_id=str(document["id"]),
                    text_hash=text_hash(values["text"]),
                    **values,
                    frames=0,
                    fps=0.0,
                    duration_seconds=0.0,
                    width=0,
                    height=0,
                    tokens=document["tokens"],
                )
            )
        return rows
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"npy and json members do not describe documents ({type(error).__name__}: {error})",
            where=f"{path.name}:{key}",
            fix="json needs documents: [{id, start, tokens, text, split, corpus}]",
        ) from None


def _video(handle: BinaryIO, path: Path, key: str, members: dict[str, Member], corpus: str) -> IndexRow:
    where = f"{path.name}:{key}"
    video = next((members[kind] for kind in members if kind in VIDEO_KINDS), None)
    meta = members.get("json") or members.get("txt")
    if video is None or meta is None:
        raise DataError(
            f"members {sorted(members)}: need one of {sorted(VIDEO_KINDS)} and .json or .txt",
            where=where,
            fix="remove the sample, or add what is missing",
        )
    values = _parse(handle, path, key, members["json"]) if "json" in members else {}
    text = next((str(values[name]) for name in _TEXT_FIELDS if values.get(name)), "")
    if not text and "txt" in members:
        text = _read(handle, members["txt"]).decode("utf-8").strip()
    if not text:
        raise DataError(
            f"no text under {list(_TEXT_FIELDS)}", where=where, fix="add the text to its json or txt member"
        )
    info = probe(_read(handle, video))
    return IndexRow(
        shard=path.name,
        key=key,
        offset=video.offset,
        size=video.size,
        crc32=video.crc32,
        meta_offset=meta.offset,
        meta_size=meta.size,
        meta_crc32=meta.crc32,
        split=str(values.get("split") or _SPLIT_PREFIXES.get(path.name.partition("-")[0], "train")),
        corpus=str(values.get("corpus") or corpus),
        sample_id=str(values.get("id") or key),
        text=text,
        text_hash=text_hash(text),
        language=str(values.get("language", "")),
        sign_language=str(values.get("sign_language", "")),
        signer=str(values.get("signer", "")),
        gloss=str(values.get("gloss", "")),
        frames=info.frames,
        fps=info.fps,
        duration_seconds=info.frames / info.fps if info.fps else info.duration_seconds,
        width=info.width,
        height=info.height,
        tokens=0,
    )
