"""Timed texts from caption files: WebVTT, SubRip, YouTube's json3, lists of JSON objects and simple TTML.

The parsers are strict: anything they cannot read is a DataError with file and line, never skipped. They set no policy:
captions keep their times, even if one ends before it starts or overlaps another; the corpora decide what to leave out.

Formats: WebVTT (W3C, 2019), SubRip as players accept it, json3 as ``yt-dlp --sub-format json3`` writes it, the lists
of ``{text, start, duration}`` of youtube-transcript-api, TTML ``<p begin end>`` with clock or offset times.
"""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError

SUFFIXES = (".vtt", ".srt", ".json3", ".json", ".ttml")
MAX_FILE_BYTES = 64 << 20
"""Captions of a whole day take a few MB; a file above this is something else."""
_FIX = "fetch the captions again, or convert them to WebVTT"
_ARROW = "-->"
_STAMP = r"(?:([0-9]{1,4}):)?([0-9]{1,2}):([0-5][0-9])[.,]([0-9]{1,3})"
_CUE_TIMES = re.compile(rf"[ \t]*{_STAMP}[ \t]*-->[ \t]*{_STAMP}(?:[ \t]+(.*))?")
_WORD_TIME = re.compile(r"<(?:[0-9]{2,4}:)?[0-9]{2}:[0-9]{2}\.[0-9]{3}>")
_TAG = re.compile(r"</?(?:[A-Za-z][^<>]*|[0-9][0-9:.]*)?>")
_LONG_NUMBER = re.compile(r"&#[0-9]{9,};?")  # no character has such a number, and Python refuses to read very long ones
_OVERRIDE = re.compile(r"\{\\[^{}]*\}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028\u2029]")
_INVISIBLE = re.compile("[\u200b\u2060\ufeff]")
_BLOCK = re.compile(r"(?:NOTE|STYLE|REGION)(?:[ \t]|$)")
_SOUND = re.compile(r"\[[^\[\]]*\]|\([^()]*\)|（[^（）]*）|【[^【】]*】|\*[^*]*\*|＊[^＊]*＊|[♪♫♬][^♪♫♬]*[♪♫♬]?")
_OFFSET_TIME = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(h|ms|m|s)")
_OFFSET_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption: when it is shown and what it says, without markup, on one line."""

    start_seconds: float
    end_seconds: float
    """As written; may lie before the start."""
    text: str
    line: int
    """Line of its times in the file, from 1; in JSON and TTML files the number of the event."""


@dataclass(frozen=True, slots=True)
class Track:
    """All captions of one file."""

    captions: list[Caption]
    """Ordered by start, end and line; without empty ones."""
    automatic: bool
    """Words have their own times: speech recognition, not captions written by people."""


def read_captions(path: Path) -> list[Caption]:
    """The captions of a file, see :func:`read_track`."""
    return read_track(path).captions


def read_track(path: Path) -> Track:
    """Parse a caption file by its suffix: .vtt, .srt, .json3, .json or .ttml.

    Raises:
        DataError: another suffix, a file that cannot be read or decoded, or a line that the format does not allow.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"unknown caption format {path.suffix!r}", where=str(path), fix=f"use {', '.join(SUFFIXES)}")
    return parse_track(read_caption_file(path), path.suffix.lower(), str(path))


def read_caption_file(path: Path) -> bytes:
    """The bytes of a file of timed texts. Raises DataError when it cannot be read or is far too large."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{size} bytes are no captions", where=str(path), fix=_FIX)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"captions cannot be read ({error.strerror})", where=str(path), fix="check the path") from None


def parse_track(payload: bytes, suffix: str, where: str) -> Track:
    """:func:`read_track` of bytes in memory; ``suffix`` is one of :data:`SUFFIXES`."""
    captions, automatic = _PARSERS[suffix](caption_text(payload, where), where)
    return Track(sorted(captions, key=lambda c: (c.start_seconds, c.end_seconds, c.line)), automatic)


def caption_text(payload: bytes, where: str) -> str:
    """The text of a file. Raises DataError with the line if it is not UTF-8."""
    try:
        return payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = payload.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"not UTF-8: byte 0x{payload[error.start]:02x}", where=f"{where}:{line}", fix="convert the file to UTF-8"
        ) from None


def sound_only(text: str) -> bool:
    """Whether nothing in a caption is signed: ``[Music]``, ``(applause)``, ``* Applaus *``, ``♪ la la ♪``,
    ``[NOT-SIGNED]``."""
    return not re.search(r"\w", _SOUND.sub(" ", text))


def _parse_vtt(text: str, where: str) -> tuple[list[Caption], bool]:
    """WebVTT. Rolling captions repeat the previous line; each line is taken once, when it appears."""
    lines = _lines(text)
    if not re.fullmatch(r"WEBVTT(?:[ \t].*)?", lines[0]):
        raise DataError(f"the first line is {lines[0][:40]!r}, not WEBVTT", where=f"{where}:1", fix=_FIX)
    start = 1
    while start < len(lines) and lines[start] and _ARROW not in lines[start]:
        start += 1  # header lines: Kind, Language, X-TIMESTAMP-MAP
    cues = [
        cue
        for first, block in _blocks(lines, start)
        if not _BLOCK.match(block[0])
        for cue in [_cue(first, block, where)]
    ]
    automatic = any(_WORD_TIME.search(line) for _, _, _, payload in cues for line in payload)
    captions: list[Caption] = []
    shown: list[str] = []
    for begin, end, number, payload in cues:
        written = [clean for line in payload if (clean := one_line(_unmarked(line)))]
        fresh = _unrolled(written, shown) if automatic else written
        shown = written
        if fresh:
            captions.append(Caption(begin, end, " ".join(fresh), number))
    return captions, automatic


def _parse_srt(text: str, where: str) -> tuple[list[Caption], bool]:
    """SubRip: the number before the times may be missing, the decimal mark may be a point."""
    captions = []
    for first, block in _blocks(_lines(text), 0):
        begin, end, number, payload = _cue(first, block, where)
        if words := one_line(" ".join(_OVERRIDE.sub("", _unmarked(line)) for line in payload)):
            captions.append(Caption(begin, end, words, number))
    return captions, False


def _parse_json(text: str, where: str) -> tuple[list[Caption], bool]:
    """json3 (``{"events": [{tStartMs, dDurationMs, segs}]}``) or a list of ``{text, start, duration | end}``."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"not JSON ({error})", where=f"{where}:{line}", fix=_FIX) from None
    if isinstance(content, list):
        return [c for n, entry in enumerate(content, 1) if (c := _entry(entry, n, f"{where} entry {n}"))], False
    if not isinstance(content, dict) or not isinstance(content.get("events"), list):
        shown = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"neither json3 events nor a list of captions; found {shown}", where=where, fix=_FIX)
    captions, automatic = [], False
    for number, event in enumerate(content["events"], 1):
        words, timed = _event_text(event, f"{where} event {number}")
        automatic = automatic or timed
        if words:  # events without text define windows, or append a line break to a rolling caption
            begin = _number(event.get("tStartMs"), f"{where} event {number} tStartMs")
            length = _number(event.get("dDurationMs"), f"{where} event {number} dDurationMs")
            captions.append(Caption(begin / 1000, (begin + length) / 1000, words, number))
    return captions, automatic


def _parse_ttml(text: str, where: str) -> tuple[list[Caption], bool]:
    """TTML: every ``<p>`` with its own ``begin`` and ``end`` or ``dur``."""
    root = xml_root(text, where, "TTML")
    captions = []
    paragraphs = (element for element in root.iter() if str(element.tag).rpartition("}")[2] == "p")
    for number, paragraph in enumerate(paragraphs, 1):
        spot = f"{where} paragraph {number}"
        if not (words := one_line(" ".join(paragraph.itertext()))):
            continue
        begin = _offset(paragraph.get("begin"), f"{spot} begin")
        lasting = paragraph.get("end") is None
        end = _offset(paragraph.get("dur" if lasting else "end"), f"{spot} end")
        captions.append(Caption(begin, begin + end if lasting else end, words, number))
    return captions, False


def xml_root(text: str, where: str, kind: str) -> ElementTree.Element:
    """The root of an XML document. Raises DataError for a document type or entities, which could make it grow."""
    if re.search(r"<!(?!--)", text):
        raise DataError(f"a document type or entity in {kind}", where=where, fix=_FIX)
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        line = getattr(error, "position", (1, 0))[0]
        raise DataError(
            f"not {kind} ({error}): the XML is not well formed", where=f"{where}:{line}", fix=_FIX
        ) from None


_PARSERS: dict[str, Callable[[str, str], tuple[list[Caption], bool]]] = {
    ".vtt": _parse_vtt,
    ".srt": _parse_srt,
    ".json3": _parse_json,
    ".json": _parse_json,
    ".ttml": _parse_ttml,
}


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n|\r|\n", text)


def _blocks(lines: list[str], start: int) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, lines) of every block between empty lines; a line of spaces is not empty."""
    block: list[str] = []
    for number, line in enumerate([*lines[start:], ""], start + 1):
        if line:
            block.append(line)
        elif block:
            yield number - len(block), block
            block = []


def _cue(first: int, block: list[str], where: str) -> tuple[float, float, int, list[str]]:
    """(start, end, line number of the times, text lines) of a block: an optional identifier, times, text."""
    at = next((index for index in (0, 1) if index < len(block) and _ARROW in block[index]), None)
    if at is None:
        raise DataError(f"no times in the block that begins {block[0][:40]!r}", where=f"{where}:{first}", fix=_FIX)
    match = _CUE_TIMES.fullmatch(block[at])
    if match is None:
        raise DataError(f"cannot read the times {block[at][:60]!r}", where=f"{where}:{first + at}", fix=_FIX)
    for offset, line in enumerate(block[at + 1 :], at + 1):
        if _ARROW in line:
            raise DataError(
                "times in the middle of a caption: an empty line is missing",
                where=f"{where}:{first + offset}",
                fix=_FIX,
            )
    marks = match.groups()
    return _stamp(marks[:4]), _stamp(marks[4:8]), first + at, block[at + 1 :]


def _stamp(marks: tuple[str | None, ...]) -> float:
    hours, minutes, whole, part = marks
    milliseconds = int((part or "").ljust(3, "0"))
    return (((int(hours or 0) * 60 + int(minutes or 0)) * 60 + int(whole or 0)) * 1000 + milliseconds) / 1000


def _unmarked(line: str) -> str:
    """A cue line without tags, its entities resolved."""
    return html.unescape(_LONG_NUMBER.sub("\ufffd", _TAG.sub("", line)))


def one_line(text: str) -> str:
    """One line without control and zero-width characters."""
    return " ".join(_INVISIBLE.sub("", _CONTROL.sub(" ", text)).split())


def _unrolled(written: list[str], shown: list[str]) -> list[str]:
    """The new lines: without the leading ones that the previous caption still shows."""
    for kept in range(min(len(written), len(shown)), 0, -1):
        if written[:kept] == shown[-kept:]:
            return written[kept:]
    return written


def _entry(entry: object, number: int, where: str) -> Caption | None:
    fields = entry if isinstance(entry, dict) else {}
    key = next((name for name in ("end", "duration") if name in fields), "")
    if not key or "text" not in fields or "start" not in fields:
        shown = sorted(fields) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"no caption with text, start and duration or end; found {shown}", where=where, fix=_FIX)
    words = one_line(_text(fields["text"], where))
    begin = _number(fields["start"], f"{where} start")
    end = _number(fields[key], f"{where} {key}")
    return Caption(begin, end if key == "end" else begin + end, words, number) if words else None


def _event_text(event: object, where: str) -> tuple[str, bool]:
    """(text, whether its words are timed) of a json3 event; empty for window definitions."""
    segments = event.get("segs", []) if isinstance(event, dict) else None
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        raise DataError("a json3 event whose segs are no list of objects", where=where, fix=_FIX)
    text = "".join(_text(segment.get("utf8", ""), where) for segment in segments)
    return one_line(text), any("tOffsetMs" in segment or "acAsrConf" in segment for segment in segments)


def _text(value: object, where: str) -> str:
    """A string that can be encoded: JSON may hold halves of surrogate pairs."""
    if not isinstance(value, str):
        raise DataError(f"the text is {type(value).__name__}", where=where, fix=_FIX)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError("the text holds half a character (a lone surrogate)", where=where, fix=_FIX) from None
    return value


def _number(value: object, where: str) -> float:
    """A finite time >= 0 below about a year, in either unit."""
    # a comparison with not-a-number is false
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e11:
        raise DataError(f"{str(value)[:40]} is no time", where=where, fix=_FIX)
    return float(value)


def _offset(value: str | None, where: str) -> float:
    """Seconds of a TTML time: ``00:00:01.5``, ``1.5s``, ``90ms``."""
    if match := re.fullmatch(_STAMP, value or ""):
        return _stamp(match.groups())
    if match := re.fullmatch(r"([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])", value or ""):
        return _stamp((*match.groups(), "0"))
    if match := _OFFSET_TIME.fullmatch(value or ""):
        return float(match[1]) * _OFFSET_UNITS[match[2]]
    raise DataError(f"cannot read the time {(value or '')[:40]!r}", where=where, fix=_FIX)
