"""The content of a WebDataset tar as index rows: which members make a sample, and what cannot be used.

A sample is all members with the same key: the path up to the first dot of the file name, folders included. Its members
may be anywhere in the tar, in any order; other members are ignored. It is one of:

* **video**: one member whose last extension is that of a video (VIDEO_KINDS), and ``.json`` or ``.txt`` with the text
  (``text``, ``caption``, ``translation`` or ``sentence`` in the json).
* **features**: ``.npy`` (float16 [T, D], or [K, T, D] of K views) and ``.json`` with the text, as ``slt shards
  features`` writes them.
* **text**: ``.npy`` (token ids of many documents) and ``.json`` with ``documents``, as ``slt shards build`` writes it.

Names that begin with a dot and the ``__name__`` members of WebDataset are skipped. Anything else is an error that
names the member: nobody would notice a silently skipped sample.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal.isal_zlib import crc32

from shards.errors import DataError
from shards.exchange.layout import TEXT_FIELDS, VIDEO_KINDS, TarSplits
from shards.format.tar import Member, index_tar
from shards.media.video import probe
from shards.names import ByName
from shards.schema import ANNOTATION, MARGIN_FRAMES, IndexRow, Kind, text_hash

_IMAGE_KINDS = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
_LARGEST = 1e9
_NO_SAMPLE = re.compile(r"\.|__[^/]*__$")


def tar_rows(path: Path, corpus: str, splits: TarSplits) -> tuple[Kind, list[IndexRow]]:
    """The kind of the samples of a tar (the last one's) and their index rows.

    Raises:
        DataError: a damaged tar, samples of several kinds, a sample that is none of the above, or one that names no
            split in a tar whose name leaves it open.
    """
    groups: ByName[dict[str, Member]] = ByName()
    for member in index_tar(path):
        parent, _, base = member.name.rpartition("/")
        if _NO_SAMPLE.match(base):
            continue
        name, _, kind = base.partition(".")
        key = f"{parent}/{name}" if parent else name
        if key not in groups:
            groups[key] = {}
        members = groups[key]
        if kind.lower() in members:
            raise DataError(
                f"two members named {member.name}",
                where=f"{path.name}:{name}",
                fix="give every sample a key of its own",
            )
        members[kind.lower()] = member
    rows: list[IndexRow] = []
    kinds: dict[Kind, str] = {}
    with path.open("rb") as handle:
        for key, members in groups.items():
            kind_of_sample, sample_rows = _sample(handle, path, key, members, corpus)
            kinds.setdefault(kind_of_sample, key)
            rows += sample_rows
    if len(kinds) > 1:
        mixed = " and ".join(f"{kind} ({key})" for kind, key in kinds.items())
        raise DataError(f"samples of several kinds: {mixed}", where=path.name, fix="put each kind into tars of its own")
    return next(iter(kinds), "video"), [row if row.split else row._replace(split=splits.of(path.name)) for row in rows]


def _sample(
    handle: BinaryIO, path: Path, key: str, members: dict[str, Member], corpus: str
) -> tuple[Kind, list[IndexRow]]:
    if "npy" not in members or "json" not in members:
        return "video", [_video(handle, path, key, members, corpus)]
    meta = _parse(handle, path, key, members["json"])
    if "documents" in meta:
        return "text", _documents(handle, path, key, members["npy"], meta)
    return "features", [_features(handle, path, key, members, corpus)]


def _read(handle: BinaryIO, member: Member) -> bytes:
    handle.seek(member.offset)
    return handle.read(member.size)


def _parse(handle: BinaryIO, path: Path, key: str, member: Member) -> dict[str, Any]:
    try:
        return dict(json.loads(_read(handle, member)))
    except (ValueError, TypeError) as error:
        where = f"{path.name}:{key}"
        raise DataError(f"{member.name} is no JSON object ({error})", where=where, fix="repair it") from None


def _documents(handle: BinaryIO, path: Path, key: str, npy: Member, meta: dict[str, Any]) -> list[IndexRow]:
    """Rows of the documents in one token member, from the starts in its json member."""
    payload = _read(handle, npy)
    try:
        ids = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
        header, width = len(payload) - ids.nbytes, ids.itemsize
        rows = []
        for document in meta["documents"]:
            begin, size = header + document["start"] * width, document["tokens"] * width
            values: dict[str, Any] = {name: str(document.get(name, "")) for name in ANNOTATION}
            rows.append(
                IndexRow(
                    shard=path.name,
                    key=key,
                    offset=npy.offset + begin,
                    size=size,
                    crc32=crc32(payload[begin : begin + size]),
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
    video = _video_member(where, members)
    annotation = _annotated(handle, path, key, members, corpus)
    try:
        info = probe(_read(handle, video))
    except DataError as error:
        raise DataError(
            f"{video.name} cannot be used: {error.what}", where=where, fix="repair or remove the sample"
        ) from None
    meta = _parse(handle, path, key, members["json"]) if "json" in members else {}
    frames = info.frames - 2 * int(meta.get(MARGIN_FRAMES, 0))  # how many seconds they are, the manifest says
    stored: dict[str, Any] = {"frames": frames, "fps": info.fps, "width": info.width, "height": info.height}
    stored["duration_seconds"] = frames / info.fps if info.fps else info.duration_seconds
    return _clip(path, key, video, members, annotation | stored)


def _features(handle: BinaryIO, path: Path, key: str, members: dict[str, Member], corpus: str) -> IndexRow:
    """The row addresses the array's data after the header of the ``.npy`` member."""
    member = members["npy"]
    payload = _read(handle, member)
    try:
        array = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    except ValueError as error:
        raise DataError(
            f"npy and json members do not describe documents or features ({error})",
            where=f"{path.name}:{key}",
            fix=f"repair {member.name}: it is no array",
        ) from None
    if array.dtype != np.dtype("<f2") or array.ndim not in (2, 3) or not array.flags.c_contiguous:
        raise DataError(
            f"{member.name} is {array.dtype.name} {list(array.shape)}, and its json lists no documents",
            where=f"{path.name}:{key}",
            fix="features are float16 [frames, width] or [views, frames, width]; for documents the json needs "
            "documents: [{id, start, tokens, text, split, corpus}]",
        )
    header = len(payload) - array.nbytes
    data = Member(member.name, member.offset + header, array.nbytes, crc32(payload[header:]))
    meta = _parse(handle, path, key, members["json"])
    where = f"{path.name}:{key}"
    fps = _figure(meta, "fps", 0.0, where)
    stored: dict[str, Any] = {
        "frames": array.shape[-2],
        "fps": fps,
        "width": array.shape[-1],
        "height": int(_figure(meta, "height", 1.0, where)) if array.ndim == 2 else len(array),
    }
    stored["duration_seconds"] = _figure(meta, "duration_seconds", stored["frames"] / fps if fps else 0.0, where)
    return _clip(path, key, data, members, _annotated(handle, path, key, members, corpus) | stored)


def _figure(meta: dict[str, Any], name: str, otherwise: float, where: str) -> float:
    """A finite number >= 0 of a sample's json; ``otherwise`` if it is missing or null."""
    value = meta.get(name)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise DataError(f"{name} is {str(value)[:40]!r} in its json, no number", where=where, fix="correct the json")
    return float(value)


def _video_member(where: str, members: dict[str, Member]) -> Member:
    """The one video of a sample that has a text too."""
    videos = [kind for kind in members if kind.rpartition(".")[2] in VIDEO_KINDS]
    images = sorted(kind for kind in members if kind.rpartition(".")[2] in _IMAGE_KINDS)
    if len(videos) > 1:
        raise DataError(
            f"several videos, {sorted(members[kind].name for kind in videos)}",
            where=where,
            fix="give each video a key of its own",
        )
    if images and not videos:
        raise DataError(
            f"{len(images)} still images such as {members[images[0]].name}; a clip is one video",
            where=where,
            fix="unpack the tar and build from the frame folders: `slt shards build table ...`",
        )
    if not videos or not {"json", "txt"} & set(members):
        raise DataError(
            f"members {sorted(members)}: need one of {sorted(VIDEO_KINDS)} and .json or .txt",
            where=where,
            fix="remove the sample, or add what is missing",
        )
    return members[videos[0]]


def _annotated(
    handle: BinaryIO, path: Path, key: str, members: dict[str, Member], corpus: str
) -> dict[str, str | int | float]:
    """The annotation of a clip, as fields of an index row."""
    values = _parse(handle, path, key, members["json"]) if "json" in members else {}
    text = next((str(values[name]) for name in TEXT_FIELDS if values.get(name)), "")
    if not text and "txt" in members:
        text = _read(handle, members["txt"]).decode("utf-8", "replace").strip()
    if not text:
        raise DataError(
            f"no text under {list(TEXT_FIELDS)}", where=f"{path.name}:{key}", fix="add the text to its json or txt"
        )
    others = {
        name: "" if values.get(name) is None else str(values[name])
        for name in ("language", "sign_language", "signer", "gloss")
    }
    return {
        "split": str(values.get("split") or ""),
        "corpus": str(values.get("corpus") or corpus),
        "sample_id": str(values.get("id") or key),
        "text": text,
        "text_hash": text_hash(text),
        **others,
    }


def _clip(path: Path, key: str, payload: Member, members: dict[str, Member], values: dict[str, Any]) -> IndexRow:
    meta = members.get("json") or members["txt"]
    return IndexRow(
        shard=path.name,
        key=key,
        offset=payload.offset,
        size=payload.size,
        crc32=payload.crc32,
        meta_offset=meta.offset,
        meta_size=meta.size,
        meta_crc32=meta.crc32,
        tokens=0,
        **values,
    )
