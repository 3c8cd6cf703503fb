"""Reading source media: strict single-threaded decoding, cuts by time, folders of images, a constant frame rate.

``err_detect=explode`` matters: by default FFmpeg conceals damaged frames. Every FFmpeg error becomes a DataError.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator
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
_END_TOLERANCE_SECONDS = 1.0  # subtitles often outlast the video a little; more means the wrong video
_SEEK_EARLY_SECONDS = 0.2  # containers seek by decoding time, which is a few frames before display time
_SLOT_EARLY = 0.25  # a frame up to a quarter slot early still counts for its slot: absorbs time stamp jitter


class MissingFrames(DataError):
    """A folder of numbered images with gaps in the numbers."""


class OpenVideo:
    """Open a path or bytes for strict single-threaded decoding: ``(container, stream, where)``; FFmpeg errors become
    DataErrors."""

    def __init__(self, source: Path | bytes, where: str) -> None:
        self.source, self.where = source, where
        self.container: Any = None

    def __enter__(self) -> tuple[Any, Any, str]:
        source = io.BytesIO(self.source) if isinstance(self.source, bytes) else str(self.source)
        try:
            container = av.open(source, options=dict(_EXPLODE), metadata_errors="replace")  # titles of any encoding
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


def decoded(container: Any, stream: Any, where: str, after_seek: bool = False) -> Iterator[av.VideoFrame]:
    """Decoded frames in display order.

    ``after_seek``: frames that are shown before the first key frame are left out; they may refer to frames before it.
    """
    found = packets(container, stream, where)
    yield from decoded_packets(_without_leading(found) if after_seek else found, where)


def decoded_packets(found: Iterable[Any], where: str) -> Iterator[av.VideoFrame]:
    """Decoded frames of packets in display order; the last packet of a stream, an empty one, flushes the decoder."""
    try:
        for packet in found:
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise DataError(f"damaged frame at {frame.time} s", where=where, fix=FIX_MEDIA)
                yield frame
    except av.FFmpegError as error:
        raise DataError(f"damaged or truncated video ({error})", where=where, fix=FIX_MEDIA) from error


def _without_leading(found: Iterator[Any]) -> Iterator[Any]:
    first: int | None = None
    for packet in found:
        if first is None:
            first = packet.pts
        if first is None or packet.pts is None or packet.pts >= first:
            yield packet


def stream_rate(stream: Any, where: str) -> float:
    """Frames per second of a stream. Raises DataError for a still image or an empty stream."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise DataError("no frame rate: a still image or an empty stream", where=where, fix=FIX_MEDIA)
    return float(rate)


class DecodingPass:
    """One pass over a media file that hands out the frames of pieces whose starts do not decrease.

    Neighbouring pieces share the decoding of the frames that lead to them. Between two pieces the pass jumps to a key
    frame when the file's index names a later one than the position reached.

    Args:
        container, stream, where: from :class:`OpenVideo`.
    """

    def __init__(self, container: Any, stream: Any, where: str) -> None:
        self.container, self.stream, self.where = container, stream, where
        self.origin = float((stream.start_time or 0) * stream.time_base)
        self.frame_seconds = 1 / stream_rate(stream, where)
        self.position = -math.inf
        """Time of the last decoded frame, seconds from the start of the stream."""
        self._frames = self._decode()
        self._held: list[tuple[float, av.VideoFrame]] = []

    def seek(self, start: float) -> bool:
        """Go to the key frame before ``start``; False when the media landed behind it (a file with a poor index)."""
        target = int((self.origin + max(0.0, start - _SEEK_EARLY_SECONDS)) / self.stream.time_base)
        try:
            self.container.seek(target, stream=self.stream, backward=True, any_frame=False)
        except av.FFmpegError:  # formats without time stamps in their packets cannot seek: read from the start
            self.container.seek(0)
            self._frames, self._held = self._decode(), []
            return True
        self._frames, self._held = self._decode(after_seek=True), []
        first = next(self._frames, None)
        if first is None:
            return True  # nothing there: reading the piece reports it
        self._frames = itertools.chain([first], self._frames)
        return first[0] <= start + self.frame_seconds

    def skip_to(self, start: float) -> None:
        """Jump ahead when that saves decoding; never backwards."""
        if self._held:
            return  # the piece begins in frames that are decoded already
        entries = self.stream.index_entries
        target = int((self.origin + max(0.0, start - _SEEK_EARLY_SECONDS)) / self.stream.time_base)
        found = entries.search_timestamp(target, backward=True, any_frame=False) if len(entries) else -1
        if found < 0:
            return
        if float(entries[found].timestamp * self.stream.time_base) - self.origin > self.position + self.frame_seconds:
            self.seek(start)

    def piece(self, media: VideoFile, following: float = math.inf) -> Iterator[tuple[float, av.VideoFrame]]:
        """(seconds from the start of the stream, frame) inside one piece; checks that the media reaches its end.

        Args:
            media: the piece.
            following: start of the next piece; its frames are kept when this one reaches into it.
        """
        start, end = media.start_seconds or 0.0, math.inf if media.end_seconds is None else media.end_seconds
        waiting, self._held = iter(self._held), []
        for seconds, frame in itertools.chain(waiting, self._frames):
            if seconds >= following - 1e-6:
                self._held.append((seconds, frame))
            if seconds >= end:
                self._held += [item for item in waiting if item[0] >= following - 1e-6]
                return
            if seconds >= start - 1e-6:
                yield seconds, frame
        self._check_end(media)

    def _decode(self, after_seek: bool = False) -> Iterator[tuple[float, av.VideoFrame]]:
        for frame in decoded(self.container, self.stream, self.where, after_seek):
            if frame.time is None:
                raise DataError(
                    "frames without time stamps", where=self.where, fix="remux the file (ffmpeg -i IN -c copy OUT.mp4)"
                )
            self.position = frame.time - self.origin
            yield self.position, frame

    def _check_end(self, media: VideoFile) -> None:
        """The media is over: was that to be expected?"""
        if self.position == -math.inf:
            raise DataError("no frame can be decoded", where=self.where, fix=FIX_MEDIA)
        stream, declared = self.stream, None
        if media.end_seconds is not None:
            declared = media.end_seconds - _END_TOLERANCE_SECONDS
        elif stream.duration:
            declared = float(stream.duration * stream.time_base) * 0.95 - 0.5
        if declared is not None and self.position < declared:
            raise DataError(
                f"the video ends at {self.position:.2f} s, "
                f"{'the segment' if media.end_seconds else 'its header'} says later",
                where=self.where,
                fix="the download is truncated, or the annotation belongs to another video",
            )


def frame_files(media: FrameFolder) -> list[Path]:
    """The images of a folder in playing order: by the number in their names where there is one, else by name.

    Raises:
        DataError: no such folder, or no image in it.
        MissingFrames: the numbers have gaps.
    """
    if not media.path.is_dir():
        raise DataError("no such frame folder", where=str(media.path), fix=FIX_MEDIA)
    files = sorted(path for path in media.path.glob(media.pattern) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"no image matches {media.pattern}", where=str(media.path), fix=FIX_MEDIA)
    numbers = _numbers([path.stem for path in files])
    if numbers is None:
        return files
    order = sorted(range(len(files)), key=lambda place: numbers[place])
    counted = sorted(numbers)
    step = min((later - earlier for earlier, later in itertools.pairwise(counted)), default=1)
    if step == 0:
        twice = next(number for number, later in itertools.pairwise(counted) if number == later)
        raise DataError(f"two images have the number {twice}", where=str(media.path), fix="remove one of the two")
    missing = sorted(set(range(counted[0], counted[-1] + 1, step)) - set(counted))
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise MissingFrames(
            f"{len(missing)} of {len(files) + len(missing)} frames are missing: numbers {shown}",
            where=str(media.path),
            fix="unpack the archive again",
        )
    return [files[place] for place in order]


def _numbers(stems: list[str]) -> list[int] | None:
    """The one number in which the names differ; None when they differ otherwise."""
    parts = [re.split(r"(\d+)", stem) for stem in stems]
    if len({len(part) for part in parts}) != 1:
        return None
    columns = list(zip(*parts, strict=True))
    differing = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) != 1 or differing[0] % 2 == 0:  # odd places hold the digits
        return None
    return [int(digits) for digits in columns[differing[0]]]


def folder_frames(media: FrameFolder) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame) of a folder of equally large images; other files in the folder are ignored."""
    shape: tuple[int, ...] | None = None
    for number, path in enumerate(frame_files(media)):
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
    early = min(_SLOT_EARLY, frame_seconds * rate / 2)  # of fast media, the frame nearest to the slot's time
    shown: av.VideoFrame | None = None
    done, seconds = 0, start
    for seconds, frame in timed:
        slot = math.floor((seconds - start) * rate + early)
        if slot >= done:
            for _ in range(slot - done if shown is not None else slot):
                yield shown or frame
            yield frame
            done = slot + 1
        shown = frame
    total = math.floor((seconds + frame_seconds - start) * rate + early)
    if shown is not None:
        for _ in range(total - done):
            yield shown
