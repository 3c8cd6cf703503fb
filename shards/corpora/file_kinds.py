"""Files that are not tables, recognised by their first bytes or names, and how to use them instead."""

from __future__ import annotations

import zlib
from pathlib import Path

from shards.errors import DataError

HEAD_BYTES = 512
_SPREADSHEET = "save it as CSV UTF-8 from the spreadsheet program, and pass that file"
_LABELS = (
    "label files of other projects are read with --labels FOLDER by phoenix14t, csl_daily, how2sign, openasl and "
    "wlasl; save others as JSON lines where you trust them"
)
_TIMED = "pass its folder to the corpus subtitles: slt shards build subtitles --videos FOLDER --subtitles FOLDER"
_UNPACK = "unpack it and pass the table inside"
KINDS_BY_SUFFIX = {
    ".eaf": ("an ELAN file", _TIMED),
    **dict.fromkeys((".srt", ".vtt", ".ttml"), ("a file of subtitles", _TIMED)),
    **dict.fromkeys((".xlsx", ".xlsm", ".xls", ".ods", ".numbers"), ("a spreadsheet", _SPREADSHEET)),
    **dict.fromkeys((".docx", ".doc", ".odt", ".pdf", ".rtf"), ("a text document", "copy its table into a CSV file")),
    **dict.fromkeys((".pkl", ".pickle"), ("a Python pickle", _LABELS)),
}
"""Suffix -> what such a file is, and the fix."""
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\3\4", "a zip archive", _UNPACK),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a file of an old office program", _SPREADSHEET),
    (b"\x1f\x8b", "compressed by gzip", "name it NAME.gz so that it is unpacked"),
    (b"BZh91AY&SY", "compressed by bzip2", "name it NAME.bz2 so that it is unpacked"),
    (b"\xfd7zXZ\0", "compressed by xz", "name it NAME.xz so that it is unpacked"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "name it NAME.zst so that it is unpacked"),
    (b"PAR1\x15", "a Parquet table", "name it NAME.parquet"),
    (b"ARROW1\0", "an Arrow file", "save it as Parquet"),
    (b"SQLite format 3\0", "an SQLite database", "export its table as CSV"),
    (b"%PDF-", "a PDF document", "copy its table into a CSV file"),
    (b"\x89HDF\r\n", "an HDF5 file", "save its table as CSV or Parquet"),
    (b"\x93NUMPY", "a NumPy array", "save its rows as JSON lines where you trust it"),
    (b"MATLAB 5.0 MAT-file", "a MATLAB file", "save its table as CSV"),
)
_PROTOCOLS = frozenset(b"\2\3\4\5")
_XML = (b"<?xml", b"<annotation_document", b"<tt")
_HTML = (b"<!doctype html", b"<html")


def binary_kind(head: bytes, name: str) -> tuple[str, str] | None:
    """What a binary file is by its first bytes, and the fix; None for text and unknown kinds."""
    office = head.startswith(b"PK\3\4") and (b"[Content_Types].xml" in head or b"opendocument" in head)
    if office or head[:4] in (b"PK\3\4", b"\xd0\xcf\x11\xe0"):
        if (known := KINDS_BY_SUFFIX.get(Path(name).suffix.lower())) is not None:
            return known
        if office:
            return "a document of an office program", _SPREADSHEET
    if head[:1] == b"\x80" and head[1:2] and head[1] in _PROTOCOLS:
        return "a Python pickle", _LABELS
    if _unpacked(head)[:1] == b"\x80":
        return "a Python pickle compressed by gzip", _LABELS
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head[4:8] == b"ftyp":
        return "a video", "pass the table that names the videos"
    return next(((what, fix) for start, what, fix in _BEGINNINGS if head.startswith(start)), None)


def _unpacked(head: bytes) -> bytes:
    """The first bytes inside gzip; none for other files."""
    try:
        return zlib.decompressobj(wbits=31).decompress(head, 16)
    except zlib.error:
        return b""


def text_kind(head: bytes) -> tuple[str, str] | None:
    """What a text file is that begins like no table, and what helps; None for what is not known."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(_HTML):
        return "a web page", "download the file itself: a page in its place often asks for a login or shows an error"
    if start.startswith(b"webvtt"):
        return KINDS_BY_SUFFIX[".vtt"]
    if b"<annotation_document" in start:
        return KINDS_BY_SUFFIX[".eaf"]
    if start.startswith(_XML):
        return "XML", "save its rows as CSV or JSON lines; the corpus subtitles reads ELAN and TTML files"
    return None


def refuse_binary(head: bytes, path: Path) -> None:
    """Raise DataError if a file that should be text begins like another kind of file."""
    if (known := binary_kind(head, path.name)) is not None:
        raise DataError(f"not text but {known[0]}", where=str(path), fix=known[1])
