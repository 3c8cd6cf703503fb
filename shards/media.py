"""Reading source media: strict single-threaded decoding, cuts by time, upright frames, a constant frame rate.

``err_detect=explode`` matters: by default FFmpeg conceals damaged frames. Every FFmpeg error becomes a DataError.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from shards.errors import DataError
from shards.schema import FrameFolder, VideoFile

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
FIX_MEDIA = "fetch the file again, or remove its row from the annotations"
_EXPLODE = {"err_detect": "explode"}
_SLOT_EARLY = 0.25  # a frame up to a quarter slot early still counts for its slot: absorbs time stamp jitter


class OpenVideo:
    """Open a path or bytes for strict single-threaded decoding: ``(container, stream, where)``; FFmpeg errors become
    DataErrors."""

    def __init__(self, source: Path | bytes, where: str) -> None:
        self.source, self.where = source, where
        self.container: Any = None

    def __enter__(self) -> tuple[Any, Any, str]:
        source = io.BytesIO(self.source) if isinstance(self.source, bytes) else str(self.source)
        try:
            container = av.open(source, options=dict(_EXPLODE))
        except FileNotFoundError:
            raise DataError("the file does not exist", where=self.where, fix=FIX_MEDIA) from None
        except (av.FFmpegError, OSError) as error:
            raise DataError(f"not a readable video ({error})", where=self.where, fix=FIX_MEDIA) from error
        if not container.streams.video:
            kinds = ", ".join(sorted({str(stream.type) for stream in container.streams})) or "nothing"
            container.close()
            raise DataError(f"no video stream, only {kinds}", where=self.where, fix=FIX_MEDIA)
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.options = dict(_EXPLODE)
        self.container = container
        return container, stream, self.where

    def __exit__(self, *_: object) -> None:
        if self.container is not None:
            self.container.close()


def packets(container: Any, stream: Any, where: str) -> Iterator[Any]:
    """Demuxed packets of one stream, without decoding."""
    try:
        yield from container.demux(stream)
    except av.FFmpegError as error:
        raise DataError(f"damaged or truncated video ({error})", where=where, fix=FIX_MEDIA) from error


def decoded(container: Any, stream: Any, where: str) -> Iterator[av.VideoFrame]:
    """Decoded frames in display order."""
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise DataError(f"damaged frame at {frame.time} s", where=where, fix=FIX_MEDIA)
            yield frame
    except av.FFmpegError as error:
        raise DataError(f"damaged or truncated video ({error})", where=where, fix=FIX_MEDIA) from error


def cut(
    frames: Iterator[av.VideoFrame], media: VideoFile, origin: float, declared: float | None, where: str
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds from the start of the file, upright frame) inside the segment; checks that the media reaches its end."""
    start, end = media.start_seconds or 0.0, math.inf if media.end_seconds is None else media.end_seconds
    last = None
    for frame in frames:
        if frame.time is None:
            raise DataError(
                "frames without time stamps", where=where, fix="remux the file (ffmpeg -i IN -c copy OUT.mp4)"
            )
        last = frame.time - origin
        if last >= end:
            return
        if last >= start - 1e-6:
            yield last, _upright(frame)
    if last is None:
        raise DataError("no frame can be decoded", where=where, fix=FIX_MEDIA)
    if declared is not None and last < declared:
        raise DataError(
            f"the video ends at {last:.2f} s, {'the segment' if media.end_seconds else 'its header'} says later",
            where=where,
            fix="the download is truncated, or the annotation belongs to another video",
        )


def _upright(frame: av.VideoFrame) -> av.VideoFrame:
    """Apply the display rotation that phones store instead of turning the pixels."""
    turns = round(frame.rotation / 90) % 4
    if not turns:
        return frame
    pixels: Any = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    return av.VideoFrame.from_ndarray(pixels, "rgb24")


def folder_frames(media: FrameFolder) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame) of a folder of equally large images; other files in the folder are ignored."""
    if not media.path.is_dir():
        raise DataError("no such frame folder", where=str(media.path), fix=FIX_MEDIA)
    files = sorted(path for path in media.path.glob(media.pattern) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"no image matches {media.pattern}", where=str(media.path), fix=FIX_MEDIA)
    shape: tuple[int, ...] | None = None
    for number, path in enumerate(files):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise DataError(f"not a readable image ({error})", where=str(path), fix=FIX_MEDIA) from error
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise DataError(
                f"{pixels.shape[:2]} pixels, the first frame has {shape[:2]}", where=str(path), fix=FIX_MEDIA
            )
        yield number / media.fps, av.VideoFrame.from_ndarray(pixels, "rgb24")


def constant_rate(
    timed: Iterator[tuple[float, av.VideoFrame]], rate: float, start: float, frame_seconds: float
) -> Iterator[av.VideoFrame]:
    """Frames at a constant rate: slot k shows the first frame that falls into it, or else the frame before.

    A gap before the first frame is filled with that frame, and the last one lasts for its own duration.
    """
    shown: av.VideoFrame | None = None
    done, seconds = 0, start
    for seconds, frame in timed:
        slot = math.floor((seconds - start) * rate + _SLOT_EARLY)
        if slot >= done:
            for _ in range(slot - done if shown is not None else slot):
                yield shown or frame
            yield frame
            done = slot + 1
        shown = frame
    total = math.floor((seconds + frame_seconds - start) * rate + _SLOT_EARLY)
    if shown is not None:
        for _ in range(total - done):
            yield shown
