"""Any corpus that is a table (tsv, csv, ``|``-separated, JSON lines, JSON array, Parquet) beside a folder of videos.

Option values name columns, because How2Sign, OpenASL, SPJ and private lists differ only in these. Examples::

    --table sentences.tsv --media video --text translation_sk --language sk --sign-language svk --test-fraction 0.2
    --table how2sign_realigned_train.csv --delimiter tab --id SENTENCE_NAME --media VIDEO_NAME --media-suffix .mp4
        --start START_REALIGNED --end END_REALIGNED --text SENTENCE --split train --language en --sign-language ase
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path, PurePath

from shards.corpora.classes import Classes
from shards.corpora.compressed import refuse_no_table
from shards.corpora.file_kinds import KINDS_BY_SUFFIX
from shards.corpora.media_files import NO_MEDIA
from shards.corpora.records import parquet_columns, read_json_rows, read_parquet
from shards.corpora.rows import DELIMITERS, read_jsonl, read_lines, read_table
from shards.corpora.splits import check_fractions, drawn_split
from shards.errors import DataError, OptionError
from shards.names import ByName
from shards.schema import SPLIT_NAME, Crop, FrameFolder, Segment, VideoFile

_SPLIT_VALUE = re.compile(r"(?:train|dev|test)(?:_[a-z0-9_]+)?")
_RECORDS = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json_rows, ".parquet": read_parquet}
_LONGEST_NAME = 255  # bytes, on the usual file systems
_NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e-[0-9]+)?"
_BOX = re.compile(rf"\[?\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]?")
_SPLIT_NAMES = {"val": "dev", "valid": "dev", "validation": "dev", "training": "train", "testing": "test"}
_CLOCK = re.compile(r"(?:(?:([0-9]{1,9}):)?([0-9]{1,9}):)?([0-9]{1,9}(?:[.,][0-9]{0,30})?)")
LANGUAGE = re.compile(r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$")


@dataclass(kw_only=True)
class Table:
    """Segments of an annotation table. The first options name columns; an empty name means "no such column"."""

    NAME = "table"

    table: Path
    id: str = "id"
    """Unique per row; empty: media and times together."""
    media: str = "media"
    start: str = ""
    """Seconds or HH:MM:SS.mmm into the media."""
    end: str = ""
    text: str = "text"
    signer: str = ""
    gloss: str = ""
    split: str = ""
    """A column (with names like train, val, test_unseen), or train | dev | test | test_... for every row; empty: by
    the fractions below."""
    language: str = ""
    """A column, or one BCP-47 code for every row."""
    sign_language: str = ""
    """A column, or one ISO 639-3 code for every row."""
    bbox: str = ""
    """Part of the picture to keep: ``left,top,right,bottom`` as fractions of its width and height."""

    corpus: str = "table"
    """Name of the corpus in index, metrics and errors."""
    media_root: Path | None = None
    """Base folder of the media column; default: the table's folder. Absolute paths in the column stay."""
    media_suffix: str = ""
    """Appended to the media column (``.mp4``)."""
    frames_fps: float = 0.0
    """Above 0: media are folders of images at this rate, matched by ``frames_pattern``."""
    frames_pattern: str = "*"
    columns: list[str] = field(default_factory=list)
    """Names of all columns of a file without a header line, in order: ``media,text``."""
    classes: Path | None = None
    """List of words by class, if the text column holds class numbers: .json, or lines of number and word."""
    class_columns: list[str] = field(default_factory=list)
    """Columns of number and word in the class list, by name or position from 1; default: the first two."""
    delimiter: str = ""
    """One character or ``tab``; default by file name: .tsv tab, .csv comma, .psv |."""
    quoting: bool | None = None
    """Whether ``"`` quotes fields; default: only for commas."""
    dev_fraction: float = 0.0
    """Without a split: this part of the rows, chosen by a hash of the id."""
    test_fraction: float = 0.0
    split_seed: int = 0
    bbox_square: bool = False
    """Widen the shorter side of every bbox until it is square in pixels."""
    settings: dict[str, object] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.table = Path(self.table)
        self.name = self.corpus
        self._suffix = self.table.suffix.lower()
        if self._suffix != ".parquet":
            refuse_no_table(self.table)
        self._classes = Classes(Path(self.classes), self.class_columns) if self.classes is not None else None
        self.settings = {"classes": self.classes.name} if self.classes is not None else {}
        self.read_records = _RECORDS.get(self._suffix)
        self.delimiter = "\t" if self.delimiter in ("tab", "\\t") else self.delimiter or self._usual_delimiter()
        if self.quoting is None:
            self.quoting = self.delimiter == ","
        where = f"corpus {self.corpus}"
        if not self.read_records and len(self.delimiter) != 1:
            raise OptionError(
                f"delimiter {self.delimiter!r} is not one character", where=where, fix="for example --delimiter tab"
            )
        check_fractions(self.dev_fraction, self.test_fraction, where)
        if self.bbox and self.frames_fps > 0:
            raise OptionError("bbox works on video files, not on folders of frames", where=where, fix="leave bbox out")
        self.root = Path(self.media_root) if self.media_root is not None else self.table.parent
        self._resolve_either(set(self._header()))

    def _usual_delimiter(self) -> str:
        if self.read_records:
            return ""
        if self._suffix not in DELIMITERS:
            what, helps = KINDS_BY_SUFFIX.get(self._suffix, ("", ""))
            raise OptionError(
                f"cannot tell the delimiter of a {self.table.suffix or 'suffix-less'} file",
                where=str(self.table),
                fix=(f"for {what}: {helps}; for a table of this name " if what else "")
                + "add --delimiter tab, --delimiter ',' or --delimiter '|'",
            )
        return DELIMITERS[self._suffix]

    def _header(self) -> list[str]:
        if self._suffix == ".parquet":
            return parquet_columns(self.table)
        if self.columns and self.read_records:
            raise OptionError(
                f"{self.table.suffix} files name their own fields",
                where=f"corpus {self.corpus}: columns",
                fix="leave --columns out",
            )
        if self.columns:
            return self.columns
        if self.read_records:
            return list(next(self.read_records(self.table, []), (0, {}))[1])
        first = next(read_lines(self.table), (0, ""))[1]
        return [name.strip('"') if self.quoting else name for name in first.split(self.delimiter)]

    def _resolve_either(self, header: set[str]) -> None:
        """Decide which of split, language and sign_language name a column and which give a value."""
        spelled = ByName((name, name) for name in header)
        self._columns = {
            key: spelled.get(getattr(self, key), getattr(self, key))
            for key in ("id", "media", "start", "end", "text", "signer", "gloss", "bbox")
            if getattr(self, key)
        }
        self._values: dict[str, str] = {}
        for key, valid, expected in (
            ("split", _SPLIT_VALUE.fullmatch, "train, dev, test or a name that begins so, like test_unseen"),
            ("language", LANGUAGE.match, "a BCP-47 code such as de"),
            ("sign_language", LANGUAGE.match, "an ISO 639-3 code such as gsg"),
        ):
            value = getattr(self, key)
            if value in spelled:
                self._columns[key] = spelled[value]
            elif not value or valid(value):
                self._values[key] = value
            else:
                raise OptionError(
                    f"{key}={value!r} is neither a column of {sorted(header)} nor {expected}",
                    where=f"corpus {self.corpus}",
                    fix="name an existing column or give the value itself",
                )

    def segments(self) -> Iterator[Segment]:
        """One segment per row, in file order. Raises DataError for an unusable table, split or time."""
        needed = list(self._columns.values())
        rows: Iterator[tuple[int, Mapping[str, object]]] = (
            self.read_records(self.table, needed)
            if self.read_records
            else read_table(self.table, self.delimiter, bool(self.quoting), needed, self.columns)
        )
        for line, row in rows:
            cells = {key: _cell(row[name]) for key, name in self._columns.items()}
            yield self._segment(self._values | cells, f"{self.table}:{line}")

    def _segment(self, cells: dict[str, str], origin: str) -> Segment:
        start, end = (seconds(cells.get(key, ""), f"{origin} {key}") for key in ("start", "end"))
        sample_id = cells.get("id") or "@".join(filter(None, (cells["media"], cells.get("start"), cells.get("end"))))
        if not sample_id:
            raise DataError(
                "the identifier is empty", where=origin, fix="fill it, or add --id '' to use media and times"
            )
        if any(len(part.encode()) > _LONGEST_NAME for part in PurePath(cells["media"] + self.media_suffix).parts):
            raise DataError(
                f"media {cells['media'][:40]!r}... cannot name a file", where=origin, fix="check the column"
            )
        if ".." in PurePath(cells["media"]).parts:
            raise DataError(
                f"media {cells['media']!r} leaves its folder", where=origin, fix="add --media-root FOLDER instead of .."
            )
        # A row without media must not point at the root folder itself: it becomes a counted skip.
        path = self.root / ((cells["media"] + self.media_suffix) if cells["media"] else NO_MEDIA)
        frames = FrameFolder(path, self.frames_pattern, self.frames_fps) if self.frames_fps > 0 else None
        return Segment(
            corpus=self.corpus,
            id=sample_id,
            split=self._split(cells.get("split", ""), sample_id, origin),
            text=cells["text"] if self._classes is None else self._classes.word(cells["text"], origin),
            media=frames or VideoFile(path, start, end, _crop(cells.get("bbox", ""), self.bbox_square, origin)),
            language=cells.get("language", ""),
            sign_language=cells.get("sign_language", ""),
            signer=cells.get("signer", ""),
            gloss=cells.get("gloss", ""),
            origin=origin,
        )

    def _split(self, value: str, sample_id: str, origin: str) -> str:
        if value or "split" in self._columns:
            split = usual_split(value)
            if not SPLIT_NAME.fullmatch(split):
                raise DataError(f"split {value!r}", where=origin, fix="use train, dev, test or another plain word")
            return split
        return drawn_split(sample_id, self.split_seed, self.dev_fraction, self.test_fraction)


def usual_split(name: str) -> str:
    """Our name of a split: ``dev`` for ``Validation``."""
    return _SPLIT_NAMES.get(name.lower(), name.lower())


def _cell(value: object) -> str:
    """A table's value as text: lists as ``a,b`` of numbers or ``a b`` of words, missing ones empty."""
    if value is None or value != value:  # NaN stands for "missing" in Parquet files written by pandas
        return ""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")
    if isinstance(value, list):
        return (" " if any(isinstance(item, str) for item in value) else ",").join(map(_cell, value))
    return str(value).strip()


def _crop(cell: str, square: bool, origin: str) -> Crop | None:
    """The part of the picture a cell describes. Raises DataError unless it lies within the picture."""
    if not cell:
        return None
    match = _BOX.fullmatch(cell)
    left, top, right, bottom = map(float, match.groups()) if match else (1.0, 1.0, 0.0, 0.0)
    if not (left < right <= 1 and top < bottom <= 1):
        raise DataError(
            f"bbox {cell!r} is not left,top,right,bottom within 0..1",
            where=origin,
            fix="divide pixels by the width and height of the picture",
        )
    return Crop(left, top, right, bottom, square)


def seconds(cell: str, where: str) -> float | None:
    """Seconds from ``12.5``, ``MM:SS.mmm`` or ``HH:MM:SS.mmm``; None for an empty cell. Raises DataError otherwise."""
    if not cell:
        return None
    match = _CLOCK.fullmatch(cell)
    if match is None and _CLOCK.fullmatch(cell.removeprefix("-")):
        raise DataError(f"the time {cell} is negative", where=where, fix="times count from the beginning of the media")
    if match is None:
        raise DataError(f"{cell[:60]!r} is not a time", where=where, fix="use seconds or HH:MM:SS.mmm")
    hours, minutes, rest = match.groups()
    value = float(rest.replace(",", "."))
    if (minutes and value >= 60) or (hours and int(minutes or 0) >= 60):
        raise DataError(f"{cell!r} has 60 minutes or seconds or more", where=where, fix="use HH:MM:SS.mmm, or seconds")
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + value
