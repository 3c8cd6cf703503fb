"""Margins: frames that are stored before and after a clip, so that training can move the cut (``data.jitter``).

A stored video with a margin of m frames holds m frames, the clip, and m frames again, always: where the source video
begins or ends, its first or last frame is repeated. Frame 0 of the clip is frame m of the stored video.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import av

from shards.errors import OptionError
from shards.schema import Segment, VideoFile


def margin_frames(margin_seconds: float, rate: float) -> int:
    """Frames of a margin on each side."""
    return round(margin_seconds * rate)


def check_margin(segment: Segment) -> None:
    """Refuse a margin around a clip that is a whole file: there is nothing around it. Raises OptionError."""
    media = segment.media
    if not isinstance(media, VideoFile) or media.start_seconds is None or media.end_seconds is None:
        raise OptionError(
            f"{segment.id} is a whole file or a folder of frames: it has nothing around it",
            where=f"margin_seconds, {segment.origin or segment.corpus}",
            fix="store margins only for corpora whose segments have times in longer videos",
        )


def widened(piece: VideoFile, margin: int, rate: float) -> VideoFile:
    """The piece with its margins; the start may lie before the video."""
    assert piece.start_seconds is not None and piece.end_seconds is not None
    seconds = margin / rate
    return dataclasses.replace(
        piece, start_seconds=piece.start_seconds - seconds, end_seconds=piece.end_seconds + seconds
    )


def with_margins(frames: Iterator[av.VideoFrame], clip_frames: int, margin: int) -> Iterator[av.VideoFrame]:
    """The frames of a widened piece, completed to a whole margin at its end.

    Args:
        frames: from the first one of the margin on.
        clip_frames: of the clip by its times; fewer where the video ends in it.
        margin: frames on each side.
    """
    count, last = 0, None
    for frame in itertools.islice(frames, clip_frames + 2 * margin):
        yield frame
        count, last = count + 1, frame
    if last is not None:  # that enough of the clip lies inside, the decoding pass has checked
        inside = max(1, min(clip_frames, count - margin))
        yield from itertools.repeat(last, inside + 2 * margin - count)
