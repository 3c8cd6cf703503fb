"""Timed texts from ELAN files (``.eaf``, EAF 2.x and 3.0): tiers of annotations, with times of their own or a parent's.

Parsed as strictly as caption files (:mod:`shards.corpora.captions`): a reference to something missing is a DataError.
"""

from __future__ import annotations

import collections
import itertools
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element

from shards.corpora.captions import Caption, caption_text, one_line, read_caption_file, xml_root
from shards.errors import DataError, OptionError

SUFFIX = ".eaf"
_FIX = "save the file again with ELAN"
Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Tier:
    """One tier: who is annotated, and what."""

    name: str
    participant: str
    captions: list[Caption]
    """Ordered by time; without empty ones. ``line`` is the number of the annotation in its tier, from 1."""


@dataclass(frozen=True, slots=True)
class ElanFile:
    """The tiers of a file in order, and the time of its zero in each of its media."""

    tiers: list[Tier]
    origins: dict[str, float]
    """Name of a media file without suffix -> second of it at which the annotations begin to count, if not 0."""

    def chosen(self, names: list[str], where: str) -> list[Tier]:
        """The named tiers that exist; without names, the only tier with annotations.

        Raises OptionError if several tiers have annotations and none is named.
        """
        if names:
            return [tier for tier in self.tiers if tier.name in names]
        filled = [tier for tier in self.tiers if tier.captions]
        if len(filled) > 1:
            raise OptionError(
                f"{len(filled)} tiers hold annotations: {', '.join(tier.name for tier in filled)}",
                where=where,
                fix="choose those with the text: --tiers NAME,NAME",
            )
        return filled


def read_elan(path: Path) -> ElanFile:
    """Parse an ELAN file. Raises DataError if it cannot be read, is not an ELAN file, or contradicts itself."""
    return parse_elan(caption_text(read_caption_file(path), str(path)), str(path))


def parse_elan(text: str, where: str) -> ElanFile:
    """:func:`read_elan` of a text in memory."""
    root = xml_root(text, where, "ELAN")
    if root.tag != "ANNOTATION_DOCUMENT":
        raise DataError(f"the document is a {str(root.tag)[:40]}, not an ANNOTATION_DOCUMENT", where=where, fix=_FIX)
    header = root.find("HEADER")
    units = "milliseconds" if header is None else header.get("TIME_UNITS", "milliseconds")
    if units != "milliseconds":
        raise DataError(f"times in {units}", where=where, fix="save the file with a version of ELAN since 2.0")
    spans = _Spans(root, where)
    tiers = []
    for tier in root.iterfind("TIER"):
        captions = []
        for number, annotation in enumerate(_annotations(tier), 1):
            words = one_line(annotation.findtext("ANNOTATION_VALUE") or "")
            if words:
                captions.append(Caption(*spans.of(annotation), words, number))
        captions.sort(key=lambda caption: (caption.start_seconds, caption.end_seconds, caption.line))
        tiers.append(Tier(tier.get("TIER_ID", ""), tier.get("PARTICIPANT", "").strip(), captions))
    media = [] if header is None else header.findall("MEDIA_DESCRIPTOR")
    origins = {_stem(item): _milliseconds(item.get("TIME_ORIGIN"), f"{where} TIME_ORIGIN") / 1000 for item in media}
    return ElanFile(tiers, {name: seconds for name, seconds in origins.items() if seconds})


def _annotations(tier: Element) -> list[Element]:
    return [child for annotation in tier.iterfind("ANNOTATION") for child in annotation]


def _stem(media: Element) -> str:
    return PurePosixPath(media.get("MEDIA_URL", "").replace("\\", "/")).stem


class _Spans:
    """The times of every annotation: from its time slots, or as a part of the annotation it refers to."""

    def __init__(self, root: Element, where: str) -> None:
        self.where = where
        self._slots = self._read_slots(root)
        self._known: dict[str, Span] = {}
        self._parents: dict[str, str] = {}
        self._siblings: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        self._sibling_key: dict[str, tuple[str, str]] = {}
        for tier in root.iterfind("TIER"):
            for annotation in _annotations(tier):
                name = annotation.get("ANNOTATION_ID", "")
                if annotation.tag == "ALIGNABLE_ANNOTATION":
                    self._known[name] = self._slot(annotation, "1"), self._slot(annotation, "2")
                    continue
                parent = annotation.get("ANNOTATION_REF", "")
                self._parents[name] = parent
                self._sibling_key[name] = tier.get("TIER_ID", ""), parent
                self._siblings[self._sibling_key[name]].append(name)

    def of(self, annotation: Element) -> Span:
        """(start, end) in seconds. The parts of one annotation in one tier share its time evenly."""
        name = annotation.get("ANNOTATION_ID", "")
        chain = [name]
        while chain[-1] not in self._known:
            parent = self._parents.get(chain[-1])
            if parent is None or parent in chain:
                raise self._error(f"the annotation {name!r} leads to {chain[-1]!r}, which has no time")
            chain.append(parent)
        for child in reversed(chain[:-1]):
            start, end = self._known[self._parents[child]]
            siblings = self._siblings[self._sibling_key[child]]
            step, place = (end - start) / len(siblings), siblings.index(child)
            self._known[child] = start + step * place, start + step * (place + 1)
        return self._known[name]

    def _read_slots(self, root: Element) -> dict[str, float]:
        """Seconds of every time slot; slots without a time are spaced evenly between their neighbours, as in ELAN."""
        slots = root.findall("TIME_ORDER/TIME_SLOT")
        names = [slot.get("TIME_SLOT_ID", "") for slot in slots]
        times = [slot.get("TIME_VALUE") for slot in slots]
        known = [place for place, time in enumerate(times) if time is not None]
        seconds = {names[place]: _milliseconds(times[place], f"{self.where} {names[place]}") / 1000 for place in known}
        for before, after in itertools.pairwise(known):
            start, step = seconds[names[before]], (seconds[names[after]] - seconds[names[before]]) / (after - before)
            seconds |= {names[place]: start + step * (place - before) for place in range(before + 1, after)}
        return seconds

    def _slot(self, annotation: Element, number: str) -> float:
        slot = annotation.get(f"TIME_SLOT_REF{number}", "")
        if slot not in self._slots:
            raise self._error(
                f"{annotation.get('ANNOTATION_ID')!r} refers to the time slot {slot!r}, which has no time"
            )
        return self._slots[slot]

    def _error(self, what: str) -> DataError:
        return DataError(what, where=self.where, fix=_FIX)


def _milliseconds(value: str | None, where: str) -> int:
    """Milliseconds; 0 for None."""
    if value is None:
        return 0
    if not value.removeprefix("-").isdecimal() or len(value) > 12:
        raise DataError(f"{value[:40]!r} is no number of milliseconds", where=where, fix=_FIX)
    return int(value)
