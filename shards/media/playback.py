"""A whole video or a pipe as stored pictures, one after another: long videos are read once, in bounded memory.

The pictures are those that :func:`shards.media.video.transcode` encodes: a clip of them has the bytes of the same part
cut out of the file (where pictures are left out to lower the rate, a cut may hold one more at its end).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av

from shards.media.picture import Pictures
from shards.media.source import DecodingPass, OpenVideo, constant_rate
from shards.media.video import VideoOptions
from shards.schema import Crop, VideoFile


@dataclass(frozen=True, slots=True)
class Playback:
    """An open video that plays once."""

    where: str
    start_seconds: float
    """Time of picture 0 as a player shows it."""
    rate: float
    """Pictures per second."""
    pictures: Iterator[av.VideoFrame]
    """yuv420p in the stored size. A picture shown for several slots comes as often, as the same object."""

    def seconds(self, number: int) -> float:
        """When a picture begins."""
        return self.start_seconds + number / self.rate


@contextlib.contextmanager
def play(source: Path | BinaryIO, form: VideoOptions, crop: Crop | None = None) -> Iterator[Playback]:
    """Open a video file, or a stream that cannot seek (a pipe of MPEG-TS, Matroska or fragmented mp4).

    Args:
        source: file, or the open stream.
        form: rate and size of the pictures.
        crop: keep only this part of every picture, for example the interpreter's corner.

    Raises:
        DataError: not a readable video; while it plays, damage or a jump of the time stamps.
    """
    where = str(source) if isinstance(source, Path) else "standard input"
    with OpenVideo(source, where) as (container, stream, _):
        decoding = DecodingPass(container, stream, where)
        media = VideoFile(Path(where))
        start, rate = decoding.begin(media), form.fps or 1 / decoding.frame_seconds
        convert = Pictures(crop, form.short_side, stream.sample_aspect_ratio, where)
        slots = constant_rate(decoding.piece(media), rate, start, decoding.frame_seconds)
        yield Playback(where, start, rate, map(convert, slots))
