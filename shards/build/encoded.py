"""Counts of what a build did to its media: whole files that were encoded, and segments cut at the video's end.

Counted in the manifest as ``encoded/<why>``, with ``encoded/<why>/source_bytes`` and ``encoded/<why>/stored_bytes``,
and as ``cut_at_end``.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import NamedTuple

from shards.build.prepare import PreparedVideo, Skip
from shards.schema import IndexRow, RowsFile, Segment, VideoFile

CUT_AT_END = "cut_at_end"
REASONS = {
    "codec": "not H.264 with 8-bit 4:2:0 pictures",
    "container": "not in an mp4 file",
    "size": "larger than short_side, or odd; --store short_side=0 keeps even sizes",
    "rate": "another frame rate than fps; --store fps=0 keeps every constant rate",
    "pixels": "pixels that are not square",
    "late_start": "the picture begins after the file does",
    "streams": "sound or other streams beside the picture",
    "edit_list": "an edit list leaves pictures out",
    "uneven_times": "a frame rate that varies",
    "key_frames": "key frames farther apart than gop; --store gop=250 keeps what x264 writes by default",
    "turned": "turned or interlaced pictures",
}
"""Why a whole file is not stored unchanged, and the option that would store it."""
_PREFIX, _SOURCE, _STORED = "encoded/", "source_bytes", "stored_bytes"
_FRAMES_OF_DOUBT = 2


class Stored(NamedTuple):
    """The results for the segments of a shard."""

    rows: list[IndexRow]
    skips: list[Skip]
    tallies: collections.Counter[str]
    """Counts over the samples, see :func:`tally`."""


def tally(segment: Segment, prepared: PreparedVideo) -> collections.Counter[str]:
    """The counts of one stored sample: whether it was encoded, and why; whether it was cut."""
    counts: collections.Counter[str] = collections.Counter()
    if prepared.why:
        name = f"{_PREFIX}{prepared.why}"
        counts |= {name: 1, f"{name}/{_SOURCE}": prepared.source_bytes, f"{name}/{_STORED}": len(prepared.payload)}
    media = segment.media
    if isinstance(media, VideoFile | RowsFile) and media.end_seconds is not None:
        missing_seconds = media.end_seconds - (media.start_seconds or 0.0) - prepared.info.duration_seconds
        counts[CUT_AT_END] = int(missing_seconds * prepared.info.fps > _FRAMES_OF_DOUBT)
    return +counts


def encoded_lines(counts: Mapping[str, int]) -> list[str]:
    """The counts of a manifest as lines of text, the largest first."""
    numbers = {name: n for name, n in counts.items() if name.startswith(_PREFIX) and name.count("/") == 1}
    lines = []
    for name, number in sorted(numbers.items(), key=lambda item: -item[1]):
        source, stored = counts[f"{name}/{_SOURCE}"] / 1e6, counts[f"{name}/{_STORED}"] / 1e6
        word = name.removeprefix(_PREFIX)
        files = "whole file" if number == 1 else "whole files"
        lines.append(f"encoded: {number} {files}, {source:.1f} -> {stored:.1f} MB: {REASONS.get(word, word)}")
    if cut := counts.get(CUT_AT_END):
        lines.append(f"cut_at_end: {cut} of the segments end after their video does")
    return lines
