"""Make our shard sets from the stores of other projects: WebDataset tars, LMDB frame stores, MosaicML MDS.

Videos and frames are first written out beside the target (so it needs their space for a while) and then built like any
corpus: in the stored form, in parallel, bad media counted and named, complete or absent.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from shards.build import BuildOptions, BuildProgress, BuildRun, build
from shards.convert_lmdb import image_suffix, is_video, read_lmdb
from shards.convert_mds import read_mds
from shards.corpora.rows import DELIMITERS, read_table
from shards.errors import DataError
from shards.opening import media_type
from shards.schema import FrameFolder, Manifest, Segment, VideoFile
from shards.tar import Member, index_tar

logger = logging.getLogger(__name__)
Format = Literal["wds", "lmdb", "mds"]
FORMATS: tuple[Format, ...] = ("wds", "lmdb", "mds")
_TEXT_FIELDS = ("text", "caption", "translation", "sentence")
_ID_FIELDS = ("id", "key", "name", "__key__")
_FIELDS = ("id", "text", "split", "signer", "gloss", "language", "sign_language")
_SPLITS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
_VIDEO_KINDS = frozenset({"mp4", "mkv", "webm", "mov", "avi", "m4v"})
_IMAGE_KINDS = frozenset({"jpg", "jpeg", "png"})
_SUFFIX = {"video/mp4": ".mp4", "video/webm": ".webm", "video/x-msvideo": ".avi"}


@dataclass(frozen=True)
class ConvertOptions:
    """Where the samples come from and what their fields mean."""

    source: Path
    format: Format
    corpus: str
    """Name of the corpus in the new index."""
    fps: float = 25.0
    """Frame rate of stores that hold images."""
    table: Path | None = None
    """Annotations by id (.tsv, .csv, .psv), for stores that hold no texts; they win over the store's own fields."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Which column or field is which: ``{"id": "name", "text": "translation"}``; others keep their own names."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Values of fields that a sample does not have: ``{"language": "de"}``."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise DataError(f"unknown format {self.format!r}", where="--format", fix=f"known: {', '.join(FORMATS)}")
        for name in [*self.columns, *self.defaults]:
            if name not in _FIELDS:
                raise DataError(f"unknown field {name!r}", where="convert", fix=f"known: {', '.join(_FIELDS)}")
        if self.fps <= 0:
            raise DataError(f"{self.fps:g} frames per second", where="--fps", fix="give the rate of the frames")


@dataclass(frozen=True)
class Found:
    """One sample of a foreign store."""

    name: str
    where: str
    media: bytes | list[bytes]
    """A video file, or encoded images in playing order."""
    fields: Mapping[str, str]


def convert(
    options: ConvertOptions,
    out: Path,
    storage: BuildOptions,
    workers: int = 1,
    on_progress: Callable[[BuildProgress], None] | None = None,
) -> Manifest:
    """Write the shard set ``out`` from a foreign store.

    Args:
        options: the store.
        out: new folder.
        storage: the stored form; ready videos are kept as they are, images are encoded.
        workers: processes.
        on_progress: told about the build.

    Raises:
        DataError: an unreadable store, annotations that fit no sample, or as ``shards.build.build``.
    """
    out = Path(os.path.abspath(out))
    staging = out.with_name(f".{out.name}.extracted")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        segments = _extract(options, staging)
        logger.info("%s: %d samples extracted", options.source, len(segments))
        return build(_Extracted(options.corpus, segments), out, storage, BuildRun(workers), on_progress)
    except OSError as error:
        raise DataError(f"cannot extract the samples ({error})", where=str(staging), fix="check the disk") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@dataclass
class _Extracted:
    """The extracted samples as a corpus."""

    name: str
    items: list[Segment]

    def segments(self) -> Iterator[Segment]:
        yield from self.items


def _extract(options: ConvertOptions, staging: Path) -> list[Segment]:
    readers = {"wds": _read_wds, "lmdb": _read_lmdb, "mds": _read_mds}
    annotations = _annotations(options)
    segments = []
    matched = 0
    for number, found in enumerate(readers[options.format](options)):
        values = {name: value for name in _FIELDS if (value := _field(name, found.fields, options))}
        name = values.get("id") or found.name
        if (row := annotations.get(name)) is not None:
            values, matched = values | row, matched + 1
        values = {**options.defaults, **{key: value for key, value in values.items() if value}} | {"id": name}
        split = values.get("split", "train")
        values["split"] = _SPLITS.get(split, split)
        media = _write(found, staging / f"{number:08d}", options.fps)
        segments.append(Segment(options.corpus, media=media, origin=found.where, **{"text": "", **values}))
    if not segments:
        raise DataError("no samples", where=str(options.source), fix=f"check the path and --format {options.format}")
    if annotations and not matched:
        what = f"none of its {len(annotations)} ids is that of a sample, such as {segments[0].id!r}"
        raise DataError(what, where=str(options.table), fix="name the column with --columns id=COLUMN")
    return segments


def _field(name: str, fields: Mapping[str, str], options: ConvertOptions) -> str:
    if name in options.columns and options.table is None:
        return fields.get(options.columns[name], "")
    usual = {"text": _TEXT_FIELDS, "id": _ID_FIELDS}.get(name, (name,))
    return next((fields[key] for key in usual if fields.get(key)), "")


def _annotations(options: ConvertOptions) -> dict[str, dict[str, str]]:
    """Fields by sample id from the table."""
    if options.table is None:
        return {}
    delimiter = DELIMITERS.get(options.table.suffix)
    if delimiter is None:
        raise DataError("not a .tsv, .csv or .psv table", where=str(options.table), fix="convert it to .tsv")
    columns = {name: options.columns.get(name, name) for name in _FIELDS}
    needed = [columns["id"], columns["text"], *(column for column in options.columns.values())]
    found = {}
    for _, row in read_table(options.table, delimiter, delimiter == ",", dict.fromkeys(needed)):
        found[row[columns["id"]]] = {name: row[column] for name, column in columns.items() if row.get(column)}
    return found


def _write(found: Found, stem: Path, fps: float) -> VideoFile | FrameFolder:
    """Write a sample's media to disk."""
    if isinstance(found.media, bytes):
        path = stem.with_suffix(_SUFFIX[media_type(found.media[:64])])
        path.write_bytes(found.media)
        return VideoFile(path)
    stem.mkdir()
    for number, frame in enumerate(found.media):
        (stem / f"{number:06d}.{image_suffix(frame) or 'jpg'}").write_bytes(frame)
    return FrameFolder(stem, "*", fps)


def _read_lmdb(options: ConvertOptions) -> Iterator[Found]:
    for name, where, media in read_lmdb(options.source):
        first, _, rest = name.partition("/")
        known = rest and first in _SPLITS
        yield Found(rest if known else name, where, media, {"split": first} if known else {})


def _read_mds(options: ConvertOptions) -> Iterator[Found]:
    for sample in read_mds(options.source):
        videos = [name for name, value in sample.binary.items() if is_video(value)]
        if len(videos) != 1:
            what = f"{len(videos)} of its columns {sorted(sample.binary | sample.texts)} hold a video, expected one"
            raise DataError(what, where=f"{options.source}/{sample.where}", fix="store one mp4 per sample as bytes")
        yield Found(sample.where.replace(":", "-"), sample.where, sample.binary[videos[0]], sample.texts)


def _read_wds(options: ConvertOptions) -> Iterator[Found]:
    paths = [options.source] if options.source.is_file() else sorted(options.source.glob("*.tar"))
    for path in paths:
        with path.open("rb") as handle:
            groups = itertools.groupby(index_tar(path), key=lambda member: _key(member.name))
            for key, members in groups:
                yield _wds_sample(handle, path, key, list(members))


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    parent, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return f"{parent}/{stem}" if parent else stem


def _wds_sample(handle: BinaryIO, path: Path, key: str, members: list[Member]) -> Found:
    where = f"{path.name}:{key}"
    kinds = {member.name.rpartition("/")[2].partition(".")[2].lower(): member for member in members}
    video = next((kinds[kind] for kind in kinds if kind.rpartition(".")[2] in _VIDEO_KINDS), None)
    frames = [kind for kind in kinds if kind.rpartition(".")[2] in _IMAGE_KINDS]
    if video is None and not frames:
        raise DataError(
            f"members {sorted(kinds)}: no video and no images",
            where=where,
            fix="convert tars whose samples hold an mp4 or jpg/png frames",
        )
    fields: dict[str, str] = {"split": _SPLITS.get(path.name.partition("-")[0], "")}
    if "json" in kinds:
        fields |= _json_fields(_read(handle, kinds["json"]), where)
    if "txt" in kinds and not any(fields.get(name) for name in _TEXT_FIELDS):
        fields["text"] = _read(handle, kinds["txt"]).decode("utf-8", "replace").strip()
    if video is not None:
        return Found(key, where, _read(handle, video), fields)
    ordered = sorted(frames, key=lambda kind: (len(kind), kind))  # 2.jpg before 10.jpg, 000002.jpg before 000010.jpg
    return Found(key, where, [_read(handle, kinds[kind]) for kind in ordered], fields)


def _json_fields(data: bytes, where: str) -> dict[str, str]:
    try:
        values: Any = json.loads(data)
    except ValueError as error:
        raise DataError(f"the json member cannot be parsed ({error})", where=where, fix="repair it") from None
    if not isinstance(values, dict):
        raise DataError(f"the json member holds {type(values).__name__}, not an object", where=where, fix="repair it")
    return {name: str(value) for name, value in values.items() if isinstance(value, str | int | float)}


def _read(handle: BinaryIO, member: Member) -> bytes:
    handle.seek(member.offset)
    return handle.read(member.size)
