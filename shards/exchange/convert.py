"""Converts the stores of other projects to our shard sets: WebDataset tars, LMDB frame stores, MosaicML MDS.

Videos and frames are first extracted beside the target, which takes their space for a while, and then built like any
corpus: in the stored form, in parallel, bad media counted and named, complete or absent.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from shards.build.build import BuildOptions, BuildProgress, BuildRun, build
from shards.corpora.rows import DELIMITERS, read_table
from shards.errors import DataError, OptionError
from shards.exchange.layout import (
    SPLITS,
    TEXT_FIELDS,
    VIDEO_KINDS,
    Note,
    TarSplits,
    folder_name,
    id_in_tar,
    open_tars,
    repeating,
)
from shards.exchange.lmdb import image_suffix, is_video, read_lmdb
from shards.exchange.mds import read_mds
from shards.format.opening import media_type
from shards.format.tar import Member, index_tar
from shards.names import ByName, same_name
from shards.schema import FrameFolder, Manifest, Segment, VideoFile
from shards.storage.store import Folder, open_folder
from shards.wording import first_few

logger = logging.getLogger(__name__)
Format = Literal["wds", "lmdb", "mds"]
FORMATS: tuple[Format, ...] = ("wds", "lmdb", "mds")
_ID_FIELDS = ("id", "key", "name", "__key__")
_FIELDS = ("id", "text", "split", "signer", "gloss", "language", "sign_language")
_IMAGE_KINDS = frozenset({"jpg", "jpeg", "png"})
_NAMED = 10
_SUFFIX = {"video/mp4": ".mp4", "video/webm": ".webm", "video/x-msvideo": ".avi"}


@dataclass(frozen=True)
class ConvertOptions:
    """Where the samples come from and what their fields mean."""

    source: Path | str
    """Folder or file; for tars also a URL."""
    format: Format
    corpus: str
    """Name of the corpus in the new index."""
    fps: float = 25.0
    """Frame rate of stores that hold images."""
    table: Path | None = None
    """Annotations by id (.tsv, .csv, .psv), for stores without texts; they override the store's own fields."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our field -> column or field of the store: ``{"id": "name", "text": "translation"}``; others keep their names."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Values for fields that a sample lacks: ``{"language": "de"}``."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise OptionError(f"unknown format {self.format!r}", where="--format", fix=f"known: {', '.join(FORMATS)}")
        for name in [*self.columns, *self.defaults]:
            if name not in _FIELDS:
                raise OptionError(f"unknown field {name!r}", where="convert", fix=f"known: {', '.join(_FIELDS)}")
        if self.fps <= 0:
            raise OptionError(f"{self.fps:g} frames per second", where="--fps", fix="give the rate of the frames")


@dataclass(frozen=True)
class ForeignSample:
    """One sample of a foreign store."""

    name: str
    where: str
    media: bytes | list[bytes]
    """A video file, or encoded images in playing order."""
    fields: Mapping[str, str]
    tar: str = ""
    """The tar that holds it."""


def convert(
    options: ConvertOptions,
    out: Path,
    storage: BuildOptions,
    workers: int = 1,
    on_progress: Callable[[BuildProgress], None] | None = None,
    on_note: Note = logger.warning,
) -> Manifest:
    """Write the shard set ``out`` from a foreign store.

    If ids repeat across tars, all ids get the tar's name in front (``a/000001``).

    Args:
        options: the store.
        out: new folder.
        storage: the stored form; ready videos stay unchanged, images are encoded.
        workers: processes.
        on_progress: receives the progress of the build.
        on_note: receives notes on what was left out or assumed.

    Raises:
        DataError: an unreadable store, annotations that match no sample, or as ``shards.build.build.build``.
    """
    out = Path(os.path.abspath(out))
    staging = out.with_name(f".{out.name}.extracted")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        segments = _extract(options, staging, on_note)
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


def _extract(options: ConvertOptions, staging: Path, on_note: Note) -> list[Segment]:
    folder, tars = _open_store(options, on_note)
    names = TarSplits(tars, folder_name(folder), "", options.defaults.get("split", ""), "--defaults split=NAME")
    table = _Table(options)
    segments, origins = [], []
    for number, sample in enumerate(_samples(options, folder, tars)):
        values = {name: value for name in _FIELDS if (value := _field(name, sample.fields, options))}
        name = values.get("id") or sample.name
        values |= table.row(name, sample)
        split = values.get("split") or names.of(sample.tar)
        own = {"id": name, "split": SPLITS.get(split.lower(), split)}
        values = {**options.defaults, **{key: value for key, value in values.items() if value}, **own}
        media = _write(sample, staging / f"{number:08d}", options.fps)
        segments.append(Segment(options.corpus, media=media, origin=sample.where, **{"text": "", **values}))
        origins.append(sample.tar)
    if not segments:
        raise DataError("no samples", where=str(options.source), fix=f"check the path and --format {options.format}")
    table.check(segments[0].id, on_note)
    names.tell(on_note)
    return _unique_ids(segments, origins, on_note)


def _open_store(options: ConvertOptions, on_note: Note) -> tuple[Folder, list[str]]:
    """The folder of the store, and the names of its tars if it holds tars."""
    if options.format == "wds":
        return open_tars(options.source, on_note=on_note)
    folder = open_folder(options.source)
    if not folder.is_local:
        fix = "copy the store to a disk; only tars (--format wds) are read from an object store"
        raise DataError(f"--format {options.format} cannot be read from a URL", where=str(options.source), fix=fix)
    return folder, []


def _samples(options: ConvertOptions, folder: Folder, tars: list[str]) -> Iterator[ForeignSample]:
    if options.format == "wds":
        return _read_wds(folder, tars)
    return (_read_lmdb if options.format == "lmdb" else _read_mds)(folder.path(""))


def _unique_ids(segments: list[Segment], tars: list[str], on_note: Note) -> list[Segment]:
    if not any(tars):
        return segments
    pairs = list(zip(tars, segments, strict=True))
    if not repeating(((tar, segment.corpus, segment.id) for tar, segment in pairs), on_note):
        return segments
    return [replace(segment, id=id_in_tar(tar, segment.id)) for tar, segment in pairs]


def _field(name: str, fields: Mapping[str, str], options: ConvertOptions) -> str:
    if name in options.columns and options.table is None:
        return fields.get(options.columns[name], "")
    usual = {"text": TEXT_FIELDS, "id": _ID_FIELDS}.get(name, (name,))
    return next((fields[key] for key in usual if fields.get(key)), "")


class _Table:
    """Annotations by sample id, and which of them a sample has used."""

    def __init__(self, options: ConvertOptions) -> None:
        self._path = options.table
        self._rows: ByName[tuple[int, dict[str, str]]] = ByName()
        self._used: ByName[str] = ByName()
        if options.table is None:
            return
        delimiter = DELIMITERS.get(options.table.suffix)
        if delimiter is None:
            raise DataError("not a .tsv, .csv or .psv table", where=str(options.table), fix="convert it to .tsv")
        columns = {name: options.columns.get(name, name) for name in _FIELDS}
        needed = [columns["id"], columns["text"], *(column for column in options.columns.values())]
        for line, row in read_table(options.table, delimiter, delimiter == ",", dict.fromkeys(needed)):
            name = row[columns["id"]]
            if name in self._rows:
                raise DataError(
                    f"the id {name!r} stands in line {self._rows[name][0]} already",
                    where=f"{options.table}:{line}",
                    fix="keep one row per sample",
                )
            self._rows[name] = line, {field: row[column] for field, column in columns.items() if row.get(column)}

    def row(self, name: str, sample: ForeignSample) -> dict[str, str]:
        """Fields of a sample by its id, or by TAR/ID; empty if the table has no such row.

        Raises DataError for a second sample with the same id: the row could belong to either.
        """
        full = id_in_tar(sample.tar, name) if sample.tar else name
        chosen = full if full in self._rows else name
        if chosen not in self._rows:
            return {}
        if chosen in self._used:
            raise DataError(
                f"the id {chosen!r} is that of {self._used[chosen]} and of {sample.where}",
                where=f"{self._path}:{self._rows[chosen][0]}",
                fix=f"write the tar's name before it: {full}" if sample.tar else "make the ids of the store unique",
            )
        self._used[chosen] = sample.where
        return self._rows[chosen][1]

    def check(self, example: str, on_note: Note) -> None:
        """Note the rows that belong to no sample. Raises DataError if all of them do."""
        left = [name for name in self._rows if name not in self._used]
        if left and not self._used:
            what = f"none of its {len(self._rows)} ids is that of a sample, such as {example!r}"
            raise DataError(what, where=str(self._path), fix="name the column with --columns id=COLUMN")
        if left:
            of = f"{len(left)} of {len(self._rows)}"
            on_note(f"{self._path}: {of} rows are no sample's: {first_few(left, _NAMED)}")


def _write(sample: ForeignSample, stem: Path, fps: float) -> VideoFile | FrameFolder:
    """Write a sample's media to disk."""
    if isinstance(sample.media, bytes):
        path = stem.with_suffix(_SUFFIX[media_type(sample.media[:64])])
        path.write_bytes(sample.media)
        return VideoFile(path)
    stem.mkdir()
    for number, frame in enumerate(sample.media):
        (stem / f"{number:06d}.{image_suffix(frame) or 'jpg'}").write_bytes(frame)
    return FrameFolder(stem, "*", fps)


def _read_lmdb(path: Path) -> Iterator[ForeignSample]:
    for name, where, media in read_lmdb(path):
        first, _, rest = name.partition("/")
        known = rest and first.lower() in SPLITS
        yield ForeignSample(rest if known else name, where, media, {"split": first} if known else {})


def _read_mds(path: Path) -> Iterator[ForeignSample]:
    for sample in read_mds(path):
        videos = [name for name, value in sample.binary.items() if is_video(value)]
        if len(videos) != 1:
            what = f"{len(videos)} of its columns {sorted(sample.binary | sample.texts)} hold a video, expected one"
            raise DataError(what, where=f"{path}/{sample.where}", fix="store one mp4 per sample as bytes")
        yield ForeignSample(sample.where.replace(":", "-"), sample.where, sample.binary[videos[0]], sample.texts)


def _read_wds(folder: Folder, tars: list[str]) -> Iterator[ForeignSample]:
    for tar in tars:
        with folder.open(tar) as handle:
            groups = itertools.groupby(index_tar(tar, folder), key=lambda member: same_name(_key(member.name)))
            for _, group in groups:
                members = list(group)
                yield _wds_sample(handle, tar, _key(members[0].name), members)


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    parent, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return f"{parent}/{stem}" if parent else stem


def _wds_sample(handle: BinaryIO, tar: str, key: str, members: list[Member]) -> ForeignSample:
    where = f"{tar}:{key}"
    kinds = {member.name.rpartition("/")[2].partition(".")[2].lower(): member for member in members}
    video = next((kinds[kind] for kind in kinds if kind.rpartition(".")[2] in VIDEO_KINDS), None)
    frames = [kind for kind in kinds if kind.rpartition(".")[2] in _IMAGE_KINDS]
    if video is None and not frames:
        raise DataError(
            f"members {sorted(kinds)}: no video and no images",
            where=where,
            fix="convert tars whose samples hold an mp4 or jpg/png frames",
        )
    fields: dict[str, str] = {}
    if "json" in kinds:
        fields |= _json_fields(_read(handle, kinds["json"]), where)
    if "txt" in kinds and not any(fields.get(name) for name in TEXT_FIELDS):
        fields["text"] = _read(handle, kinds["txt"]).decode("utf-8", "replace").strip()
    if video is not None:
        return ForeignSample(key, where, _read(handle, video), fields, tar)
    ordered = sorted(frames, key=lambda kind: (len(kind), kind))  # 2.jpg before 10.jpg, 000002.jpg before 000010.jpg
    return ForeignSample(key, where, [_read(handle, kinds[kind]) for kind in ordered], fields, tar)


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
