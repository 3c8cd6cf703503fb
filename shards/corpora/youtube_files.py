"""Ids, caption files and languages of YouTube corpora."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.corpora.captions import SUFFIXES
from shards.corpora.media_files import files_below
from shards.corpora.rows import read_lines, read_table
from shards.corpora.table import seconds
from shards.errors import DataError
from shards.names import ByName

_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_CODE = re.compile(r"[a-z]{3}")
_TAG = re.compile(r"[A-Za-z]{2,3}(?:-[A-Za-z0-9_-]+)*")
# The spoken languages around a sign language, the preferred first: ISO 639-3 -> BCP-47 as YouTube writes it.
SPOKEN_LANGUAGES = {
    "ase": "en", "asf": "en", "bfi": "en", "isg": "en", "nzs": "en", "sfs": "en", "gsg": "de", "asq": "de",
    "sgg": "de", "fsl": "fr", "sfb": "fr", "fcs": "fr", "ssr": "fr", "ssp": "es", "mfs": "es", "aed": "es",
    "csn": "es", "csg": "es", "csc": "ca", "bzs": "pt", "psr": "pt", "ise": "it", "dse": "nl", "vgt": "nl",
    "swl": "sv", "dsl": "da", "nsl": "no nb", "fse": "fi", "icl": "is", "pso": "pl", "cse": "cs", "svk": "sk",
    "hsh": "hu", "rsl": "ru", "ukl": "uk", "tsm": "tr", "gss": "el", "isr": "iw he", "jsl": "ja", "kvk": "ko",
    "csl": "zh", "hks": "zh", "tss": "zh", "tsq": "th", "inl": "id in", "rms": "ro", "bqn": "bg", "eso": "et",
    "lsl": "lv", "lls": "lt",
}  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class CaptionFile:
    """A caption file of one video."""

    path: Path
    language: str
    """BCP-47 from the file name; empty where the name has none."""

    @property
    def automatic(self) -> bool:
        """Whether YouTube's name says recognised speech (``en-orig``) or machine translation (``en-de``)."""
        return bool(re.fullmatch(r"[A-Za-z]+-(?:.*-)?(?:orig|[a-z]{2,3})", self.language))

    @property
    def text_language(self) -> str:
        """The tag without the track's key, which YouTube appends (``en-j3PyPqV-e1s``)."""
        match = re.match(r"[A-Za-z]{2,3}(?:-[A-Z][a-z]{3})?(?:-(?:[A-Z]{2}|[0-9]{3}))?(?![^-])", self.language)
        return match[0] if match else self.language.partition("-")[0]

    def rank(self, languages: list[str]) -> tuple[bool, int, int, int] | None:
        """Sorts files: written by people first, then by language, exact match, and safety of the format.

        A name without a language matches any; None: another language.
        """
        for position, language in enumerate(languages):
            exact = self.language == language
            if exact or not self.language or self.language.startswith(f"{language}-"):
                where = position if self.language else len(languages)
                return self.automatic, where, int(not exact), SUFFIXES.index(self.path.suffix)
        return None


def read_ids(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, video id, code of the sign language or "") of an id list or of YouTube-SL-25's csv.

    Blank lines are skipped. Raises DataError for a line that is neither ``id`` nor ``id,code``.
    """
    for line, text in read_lines(path):
        if not text.strip():
            continue
        video, comma, code = text.strip().partition(",")
        if not _ID.fullmatch(video) or (comma and not _CODE.fullmatch(code)):
            raise DataError(
                f"{text.strip()[:60]!r} is no video id (11 letters, digits, - or _), alone or with ,code",
                where=f"{path}:{line}",
                fix="remove headers and addresses: one id a line; the corpus subtitles reads videos of any other names",
            )
        yield line, video, code


def caption_files(folder: Path) -> dict[str, list[CaptionFile]]:
    """Video id -> its caption files, in sorted order. Other names (``<id>.info.json``) are ignored."""
    files_by_video: dict[str, list[CaptionFile]] = {}
    for path in files_below(folder):
        video, tag = path.stem[:11], path.stem[11:]
        if (
            path.suffix in SUFFIXES
            and _ID.fullmatch(video)
            and (not tag or (tag[0] == "." and _TAG.fullmatch(tag[1:])))
        ):
            files_by_video.setdefault(video, []).append(CaptionFile(path, tag[1:]))
    return files_by_video


def read_spoken_languages(path: Path | None) -> dict[str, list[str]]:
    """Code of a sign language -> caption languages, the preferred first: the built-in pairs and those of a tsv."""
    known = {code: languages.split() for code, languages in SPOKEN_LANGUAGES.items()}
    if path is None:
        return known
    for line, row in read_table(path, "\t", quoting=False, needed=("sign_language", "language")):
        languages = row["language"].split()
        if not _CODE.fullmatch(row["sign_language"]) or not languages or not all(map(_TAG.fullmatch, languages)):
            raise DataError(
                f"no pair of codes: {row['sign_language']!r}, {row['language']!r}",
                where=f"{path}:{line}",
                fix="use ISO 639-3 and BCP-47, e.g. gsg and de; several languages with blanks between them",
            )
        known[row["sign_language"]] = languages
    return known


def read_openasl_evaluation(path: Path | None) -> dict[str, list[tuple[float, float]]]:
    """Video id -> (start, end) in seconds of OpenASL's clips that are not in its train split."""
    clips: dict[str, list[tuple[float, float]]] = {}
    if path is None:
        return clips
    for line, row in read_table(path, "\t", quoting=False, needed=("yid", "start", "end", "split")):
        if row["split"] == "train":
            continue
        start, end = (seconds(row[key], f"{path}:{line} {key}") for key in ("start", "end"))
        if start is None or end is None:
            raise DataError("a clip without times", where=f"{path}:{line}", fix="use the official openasl-v1.0.tsv")
        clips.setdefault(row["yid"], []).append((start, end))
    return clips


def read_people(path: Path | None) -> ByName[int] | None:
    """Segment id -> number of people in the picture; None without a file."""
    if path is None:
        return None
    counts: ByName[int] = ByName()
    for line, row in read_table(path, "\t", quoting=False, needed=("segment", "people")):
        if not re.fullmatch(r"[0-9]{1,6}", row["people"]):
            raise DataError(f"{row['people']!r} is no number of people", where=f"{path}:{line}", fix="use 0, 1, 2, ...")
        counts[row["segment"]] = int(row["people"])
    return counts
