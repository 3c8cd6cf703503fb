"""The preparation report: compares a corpus's annotations with its publication, the disk and the built set.

Per split, the annotated segments divide into those a published filter excludes, those without text, those without
media, and the usable rest; after a build also into skipped and stored ones. The report lists missing media.
"""

from __future__ import annotations

import collections
import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.atomic import write_atomic
from shards.build.build import SKIPPED_NAME
from shards.build.encoded import encoded_lines
from shards.build.layout import nothing_to_build, segment_identity, wrong_times
from shards.build.prepare import has_media
from shards.corpora.media_files import NO_MEDIA
from shards.filter.shared_texts import TRAIN, folded_hash, shared
from shards.format.index import read_index, read_manifest
from shards.schema import Corpus, RowsFile, Segment, VideoFile

MISSING_FILES_NAME, MISSING_SEGMENTS_NAME = "missing.txt", "missing.jsonl"
_REPORT_EVERY = 1000
_FIRST_FAULTS = 5
_ROWS = (
    ("published", "published"),
    ("annotated", "annotated"),
    ("excluded", "excluded"),
    ("empty_text", "no text"),
    ("missing_media", "no media"),
    ("wrong_times", "wrong times"),
    ("usable", "usable"),
    ("hours", "hours"),
    ("texts_shared_with_train", "text in train"),
    ("skipped", "skipped"),
    ("built", "built"),
    ("built_hours", "built hours"),
)


@dataclass(slots=True)
class _Split:
    annotated: int = 0
    excluded: collections.Counter[str] = field(default_factory=collections.Counter)
    empty_text: int = 0
    missing_media: int = 0
    wrong_times: int = 0
    usable: int = 0
    seconds: float = 0.0
    """Annotated length of the segments that are not excluded."""
    untimed: int = 0
    """Segments without an annotated length."""
    texts: array[int] = field(default_factory=lambda: array("Q"))
    """`folded_hash` of every text that is not excluded."""

    def hashes(self) -> NDArray[np.uint64]:
        return np.frombuffer(self.texts, dtype=np.uint64)

    def figures(self, train_texts: NDArray[np.uint64] | None) -> dict[str, Any]:
        return {
            "annotated": self.annotated,
            "excluded": dict(sorted(self.excluded.items())),
            "empty_text": self.empty_text,
            "missing_media": self.missing_media,
            "wrong_times": self.wrong_times,
            "usable": self.usable,
            "hours": None if self.untimed else round(self.seconds / 3600, 3),
            "texts_shared_with_train": None if train_texts is None else int(shared(self.hashes(), train_texts).sum()),
        }


class _Survey:
    """Counts segments; looks up every file once."""

    def __init__(self) -> None:
        self.splits: dict[str, _Split] = {}
        self.missing: list[dict[str, str]] = []
        self.repeated: list[tuple[bytes, str, str]] = []
        """(identity, id, origin) of every segment with the id of an earlier one."""
        self._ids: set[bytes] = set()
        self._present: dict[Path, bool] = {}

    def add(self, segment: Segment) -> None:
        split = self.splits.setdefault(segment.split, _Split())
        split.annotated += 1
        identity = segment_identity(segment)
        if identity in self._ids:
            self.repeated.append((identity, segment.id, segment.origin))
        self._ids.add(identity)
        if segment.excluded:
            split.excluded[segment.excluded] += 1
            return
        if segment.text.strip():
            split.texts.append(folded_hash(segment.text))
        has_text, present = bool(segment.text.strip()), self._has_media(segment)
        split.empty_text += not has_text
        split.missing_media += not present
        if not present:
            assert segment.media is not None
            media = "" if segment.media.path.name == NO_MEDIA else str(segment.media.path)
            self.missing.append({"id": segment.id, "split": segment.split, "media": media, "origin": segment.origin})
        wrong = bool(wrong_times(segment))
        split.wrong_times += wrong
        split.usable += has_text and present and not wrong
        length = 0.0 if wrong else _annotated_seconds(segment)
        split.untimed += length is None
        split.seconds += length or 0.0

    def _has_media(self, segment: Segment) -> bool:
        if segment.media is None:
            return True
        path = segment.media.path
        if path not in self._present:
            self._present[path] = has_media(segment.media)
        return self._present[path]


def corpus_report(
    corpus: Corpus, shards: Path | str | None = None, on_progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Counts of a corpus against its publication, the disk and, with ``shards``, a finished shard set.

    Args:
        corpus: read once, or twice if ids repeat; no media is opened.
        shards: a shard set built from this corpus: adds the skipped segments, by reason, and the stored ones.
        on_progress: called now and then with the number of segments read.

    Returns:
        Ready for JSON: ``corpus``, ``settings``, ``notes``, ``splits``, ``missing`` (one entry per segment without
        media: id, split, media, origin; media is empty where the annotation names none) and ``faults`` (lines of text:
        what a build refuses, such as an id that occurs twice). Per split: ``published`` (None: not stated),
        ``annotated``, ``excluded`` {reason: n}, ``empty_text``, ``missing_media``, ``wrong_times``, ``usable``,
        ``hours`` (annotated and not excluded; None where annotations tell no times), ``texts_shared_with_train``
        (None where no train split is known); with
        ``shards`` also ``skipped`` {reason: n}, ``built`` and ``built_hours``, and beside the splits ``media`` (lines:
        what was encoded and why, what was cut).

    Raises:
        DataError: unreadable annotations or shard set.
    """
    survey = _Survey()
    for number, segment in enumerate(corpus.segments(), 1):
        survey.add(segment)
        if on_progress is not None and number % _REPORT_EVERY == 0:
            on_progress(number)
    published: dict[str, int] = getattr(corpus, "published", {})
    train = survey.splits[TRAIN].hashes() if TRAIN in survey.splits else None
    nothing = np.zeros(0, dtype=np.uint64)
    splits = {
        name: {"published": published.get(name), **split.figures(nothing if name == TRAIN else train)}
        for name, split in survey.splits.items()
    }
    built: dict[str, Any] = {}
    if shards is not None:
        _add_built(splits, Path(shards))
        built = {"media": encoded_lines(read_manifest(Path(shards)).counts)}
    return {
        **built,
        "corpus": corpus.name,
        "settings": getattr(corpus, "settings", {}),
        "notes": list(getattr(corpus, "notes", ())),
        "splits": splits,
        "missing": survey.missing,
        "faults": _faults(corpus, survey),
    }


def write_missing(report: dict[str, Any], folder: Path) -> int:
    """Write ``missing.txt`` (each missing file or folder once) and ``missing.jsonl`` (each segment); returns files."""
    files = list(dict.fromkeys(entry["media"] for entry in report["missing"] if entry["media"]))
    lines = [json.dumps(entry, ensure_ascii=False) for entry in report["missing"]]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / MISSING_FILES_NAME, "".join(f"{name}\n" for name in files).encode())
    write_atomic(folder / MISSING_SEGMENTS_NAME, "".join(f"{line}\n" for line in lines).encode())
    return len(files)


def _faults(corpus: Corpus, survey: _Survey) -> list[str]:
    """Faults that fail a build however many segments it may skip."""
    repeated = {identity for identity, _, _ in survey.repeated}
    first: dict[bytes, str] = {}
    for segment in corpus.segments() if repeated else ():
        if (identity := segment_identity(segment)) in repeated:
            first.setdefault(identity, segment.origin)
    faults = [
        f"{origin}: the id {name!r} occurs twice, first at {first[identity]}"
        for identity, name, origin in survey.repeated
    ]
    excluded = sum(split.excluded.total() for split in survey.splits.values())
    if sum(split.annotated for split in survey.splits.values()) == excluded:
        faults.append(f"{corpus.name}: {nothing_to_build(excluded)}")
    return faults


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as an aligned table, one column per split, followed by reasons, faults and notes."""
    splits: dict[str, dict[str, Any]] = report["splits"]
    rows = [["", *splits]]
    rows += [
        [title, *(_cell(figures.get(key)) for figures in splits.values())]
        for key, title in _ROWS
        if any(key in figures for figures in splits.values())
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(splits) + 1)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
        if splits
    ]
    for kind in ("excluded", "skipped"):
        for name, figures in splits.items():
            lines += [f"{name}: {kind}/{reason} {number}" for reason, number in figures.get(kind, {}).items()]
    for name, figures in splits.items():
        if (stated := figures["published"]) is not None:
            counted = figures["annotated"] - sum(figures["excluded"].values())
            if counted != stated:
                lines.append(f"{name}: {counted - stated:+d} segments against the {stated} published")
    lines += report.get("media", [])
    lines += [f"fault: {fault}" for fault in report["faults"][:_FIRST_FAULTS]]
    if (more := len(report["faults"]) - _FIRST_FAULTS) > 0:
        lines.append(f"and {more} more faults; --json lists all")
    return lines + [f"note: {note}" for note in report["notes"]]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return str(sum(value.values()))
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _annotated_seconds(segment: Segment) -> float | None:
    media = segment.media
    if isinstance(media, VideoFile | RowsFile) and media.end_seconds is not None:
        return media.end_seconds - (media.start_seconds or 0.0)
    return None


def _add_built(splits: dict[str, dict[str, Any]], folder: Path) -> None:
    """Add what was built, from the index, and what was skipped, from ``skipped.jsonl``."""
    table = read_index(folder, ("split", "duration_seconds")).table
    sums = table.group_by("split").aggregate([("duration_seconds", "sum"), ("duration_seconds", "count")])
    stored = {row["split"]: row for row in sums.to_pylist()}
    skipped: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    path = folder / SKIPPED_NAME
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        skip = json.loads(line)
        if not skip["reason"].startswith("excluded/"):  # counted from the annotations already
            skipped[skip["split"]][skip["reason"]] += 1
    for name, figures in splits.items():
        row = stored.get(name, {"duration_seconds_sum": 0.0, "duration_seconds_count": 0})
        figures["skipped"] = dict(sorted(skipped[name].items()))
        figures["built"] = row["duration_seconds_count"]
        figures["built_hours"] = round(row["duration_seconds_sum"] / 3600, 3)
