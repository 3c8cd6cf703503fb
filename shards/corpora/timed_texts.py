"""Timed texts of one video, from any of the formats, and subtitles written from them."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from shards.atomic import sync_folder
from shards.corpora.captions import SUFFIXES, Caption, one_line, read_captions
from shards.corpora.elan import SUFFIX as ELAN
from shards.corpora.elan import read_elan
from shards.corpora.rows import DELIMITERS, read_table
from shards.errors import DataError, OptionError

TABLES = (".tsv", ".csv")
UNFINISHED = ".unfinished"


def read_timed(path: Path, tiers: Sequence[str] = ()) -> list[Caption]:
    """Captions in order of time: subtitles, the annotations of ELAN tiers, or a table with the columns start and end in
    seconds and perhaps text.

    Args:
        path: .vtt, .srt, .ttml, .json3, .json, .eaf, .tsv or .csv.
        tiers: of an ELAN file; default the only one with annotations.

    Raises:
        DataError: the file cannot be read, or a time span does not end after it begins.
        OptionError: an unknown format, or several ELAN tiers and none chosen.
    """
    suffix = path.suffix.lower()
    if suffix == ELAN:
        captions = [caption for tier in read_elan(path).chosen(list(tiers), str(path)) for caption in tier.captions]
    elif suffix in TABLES:
        captions = _read_rows(path)
    elif suffix in SUFFIXES:
        captions = read_captions(path)
    else:
        known = ", ".join((*SUFFIXES, ELAN, *TABLES))
        raise OptionError(
            f"{suffix or 'no suffix'!r} names no format of timed texts", where=str(path), fix=f"use {known}"
        )
    for caption in captions:
        if caption.end_seconds <= caption.start_seconds:
            raise DataError(
                f"a span ends at {caption.end_seconds:g} s, not after its start at {caption.start_seconds:g} s",
                where=f"{path}:{caption.line}",
                fix="correct the times",
            )
    return sorted(captions, key=lambda caption: (caption.start_seconds, caption.end_seconds, caption.line))


def _read_rows(path: Path) -> list[Caption]:
    captions = []
    for line, row in read_table(path, DELIMITERS[path.suffix.lower()], True, ("start", "end")):
        try:
            times = float(row["start"]), float(row["end"])
        except ValueError:
            raise DataError(
                f"start {row['start']!r} and end {row['end']!r} are no seconds",
                where=f"{path}:{line}",
                fix="write 12.5",
            ) from None
        captions.append(Caption(*times, one_line(row.get("text", "")), line))
    return captions


class SubtitleFile:
    """Subtitles written while they are found; the file has another name until it is complete.

    Args:
        out: .vtt, .srt or .jsonl; or the open stream to write to.
        suffix: format for a stream.

    Raises OptionError for another format.
    """

    def __init__(self, out: Path | TextIO, suffix: str = "") -> None:
        self.out, self.suffix = out, suffix or (out.suffix.lower() if isinstance(out, Path) else ".vtt")
        if self.suffix not in _FORMATS:
            raise OptionError(
                f"{self.suffix or 'no suffix'!r} names no format that is written",
                where=str(out),
                fix=f"use {', '.join(_FORMATS)}",
            )
        self.count = 0

    def __enter__(self) -> SubtitleFile:
        if isinstance(self.out, Path):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._writing = self.out.with_name(self.out.name + UNFINISHED)
            self._file: TextIO = self._writing.open("w", encoding="utf-8")
        else:
            self._file = self.out
        self._file.write("WEBVTT\n\n" if self.suffix == ".vtt" else "")
        self._file.flush()
        return self

    def write(self, start_seconds: float, end_seconds: float, text: str) -> None:
        """The next subtitle; whoever follows the file sees it at once."""
        self.count += 1
        self._file.write(_FORMATS[self.suffix](self.count, start_seconds, end_seconds, one_line(text)))
        self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self.out, Path):
            self._file.close()
            if error is None:
                self._writing.replace(self.out)
                sync_folder(self.out.parent)


def stamp(seconds: float, mark: str = ".") -> str:
    """``01:02:03.456``."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"


def _vtt(number: int, start: float, end: float, text: str) -> str:
    return f"{number}\n{stamp(start)} --> {stamp(end)}\n{html.escape(text, quote=False)}\n\n"


def _srt(number: int, start: float, end: float, text: str) -> str:
    # no markup is escaped in SubRip; an arrow in a text would be read as times
    return f"{number}\n{stamp(start, ',')} --> {stamp(end, ',')}\n{text.replace('-->', '→')}\n\n"


def _jsonl(number: int, start: float, end: float, text: str) -> str:
    values = {"number": number, "start": round(start, 3), "end": round(end, 3), "text": text}
    return json.dumps(values, ensure_ascii=False) + "\n"


_FORMATS = {".vtt": _vtt, ".srt": _srt, ".jsonl": _jsonl}
