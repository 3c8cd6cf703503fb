"""Video, pure per sample: probe, transcode to the stored form, decode. PyAV, one thread.

The stored form is H.264 with a short GOP and no B-frames: on signing at 256 px it decodes faster than anything but
JPEG at an eighth of the bytes, and a 16-frame piece costs one GOP. One thread per call keeps bytes deterministic;
parallelism comes from processes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from shards.errors import DataError
from shards.media import FIX_MEDIA, OpenVideo, constant_rate, cut, decoded, folder_frames, packets
from shards.schema import FrameFolder, VideoFile

_END_TOLERANCE_SECONDS = 1.0  # subtitles often outlast the video a little; more means the wrong video


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a container says about its video stream (``frames`` counted from packets when not declared)."""

    frames: int
    fps: float
    width: int
    height: int
    duration_seconds: float
    codec: str


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """The stored form. Every field decides bytes and is recorded in the manifest."""

    short_side: int = 256
    """Pixels of the shorter side; smaller media is never enlarged. 0 keeps the size."""
    fps: float = 25.0
    """Constant frame rate; faster media is decimated, slower media repeats frames. 0 keeps the source rate."""
    crf: int = 20
    gop: int = 12
    """Most frames between two key frames: what reading a piece from the middle costs."""
    preset: str = "medium"
    keep_ready: bool = True
    """Store files that already have this form unchanged instead of encoding them a second time."""

    def __post_init__(self) -> None:
        if self.short_side < 0 or self.fps < 0 or self.gop < 1 or not 0 <= self.crf <= 51:
            raise DataError(
                f"short_side {self.short_side}, fps {self.fps}: need >= 0; gop {self.gop}: >= 1; crf {self.crf}: 0..51",
                where="video options",
                fix="correct the option",
            )


def probe(source: Path | bytes) -> VideoInfo:
    """Read the container header of a file or of bytes. Raises DataError when there is no readable video stream."""
    with OpenVideo(source, str(source) if isinstance(source, Path) else "") as (container, stream, where):
        frames = stream.frames or sum(packet.size > 0 for packet in packets(container, stream, where))
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        seconds = float(stream.duration * stream.time_base) if stream.duration else frames / fps if fps else 0.0
        context = stream.codec_context
        return VideoInfo(frames, fps, context.width, context.height, seconds, context.name)


def transcode(media: VideoFile | FrameFolder, options: VideoOptions) -> bytes:
    """Cut, resize and encode one segment to the stored form; the same input gives the same bytes.

    Returns:
        An mp4 file: H.264, yuv420p, constant ``options.fps``, a key frame at least every ``options.gop`` frames, no
        B-frames, no audio.

    Raises:
        DataError: media missing, truncated or damaged, no video stream, or no frame between the two times.
    """
    where = str(media.path)
    if isinstance(media, FrameFolder):
        rate = options.fps or media.fps
        slots = constant_rate(folder_frames(media), rate, 0.0, 1 / media.fps)
        return _encode(slots, rate, options, where)
    if not media.path.is_file():
        raise DataError("the file does not exist", where=where, fix=FIX_MEDIA)
    if options.keep_ready and media.start_seconds is None and media.end_seconds is None:
        payload = media.path.read_bytes()
        if _is_ready(payload, options, where):
            return payload
    try:
        return _transcode_file(media, options, where, seek=True)
    except DataError:
        if not media.start_seconds:
            raise
        # After a seek into an open GOP the first frames may lack their references: read from the beginning instead.
        return _transcode_file(media, options, where, seek=False)


def decode(
    payload: bytes, frames: int, wanted: Sequence[int] | None = None, size: int | None = None, where: str = ""
) -> np.ndarray:
    """Decode a stored video to RGB.

    Args:
        payload: the mp4 bytes.
        frames: how many frames the index says; another number is an error.
        wanted: increasing frame numbers to return; None = all.
        size: resize the short side to this many pixels (fast bilinear) and crop the centre square; None = stored size.
        where: shard and key for error messages.

    Returns:
        uint8 [T, H, W, 3] with T = number of wanted frames.

    Raises:
        DataError: damaged bytes, another number of frames, or a wanted frame that does not exist.
    """
    order = list(range(frames)) if wanted is None else [int(number) for number in wanted]
    if not order or order[0] < 0 or order[-1] >= frames or any(a >= b for a, b in itertools.pairwise(order)):
        raise DataError(
            f"wanted frames {order[:4]}... of {frames} are not increasing", where=where, fix="ask for existing frames"
        )
    with OpenVideo(payload, where) as (container, stream, _):
        if stream.frames and stream.frames != frames:
            raise _count_error(stream.frames, frames, where)
        early = stream.frames > 0 and order[-1] < frames - 1
        first = _seek(container, stream, order[0]) if early else 0
        found, count = _collect(decoded(container, stream, where), first, order, size, early)
    if not early and count != frames:
        raise _count_error(count, frames, where)
    if len(found) != len(order):
        raise _count_error(count, frames, where)
    return np.stack(found)


def _collect(
    frames: Iterator[av.VideoFrame], first: int, order: list[int], size: int | None, early: bool
) -> tuple[list[np.ndarray], int]:
    """The wanted frames as RGB arrays, and how many frames were seen; ``early`` stops after the last wanted one."""
    found: list[np.ndarray] = []
    reformatter, number = VideoReformatter(), first
    for frame in frames:
        if len(found) < len(order) and number == order[len(found)]:
            found.append(_to_rgb(frame, reformatter, size))
        number += 1
        if early and len(found) == len(order):
            break
    return found, number


def _count_error(found: int, frames: int, where: str) -> DataError:
    return DataError(f"{found} frames, the index says {frames}", where=where, fix="rebuild this shard set")


def _seek(container: Any, stream: Any, frame: int) -> int:
    """Seek to the key frame before ``frame`` and return the number of the next decoded frame (0 = did not seek).

    Frame numbers follow from time stamps only at a constant rate; other media is read from its start.
    """
    rate = stream.average_rate
    if frame == 0 or not rate or stream.base_rate != rate or stream.start_time is None:
        return 0
    ticks = 1 / (rate * stream.time_base)
    container.seek(stream.start_time + int(frame * ticks), stream=stream, backward=True, any_frame=False)
    for packet in container.demux(stream):
        if packet.pts is not None:
            start = packet.pts
            container.seek(start, stream=stream, backward=True, any_frame=False)
            return round((start - stream.start_time) / ticks)
    return 0


def _to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter, size: int | None) -> np.ndarray:
    if size is None:
        return reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    scale = size / min(frame.width, frame.height)
    width, height = max(size, round(frame.width * scale)), max(size, round(frame.height * scale))
    image = reformatter.reformat(
        frame, width=width, height=height, format="rgb24", interpolation="FAST_BILINEAR", threads=1
    ).to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _is_ready(payload: bytes, options: VideoOptions, where: str) -> bool:
    """Whether a file already has the stored form and decodes completely (damage raises DataError)."""
    with OpenVideo(payload, where) as (container, stream, _):
        context = stream.codec_context
        short = min(context.width, context.height)
        if (
            len(container.streams) != 1
            or "mp4" not in container.format.name
            or (context.name, context.pix_fmt) != ("h264", "yuv420p")
            or (options.short_side and short > options.short_side)
            or (options.fps and stream.average_rate != Fraction(options.fps).limit_denominator(1001))
            or stream.start_time
        ):
            return False
        times: list[int] = []
        keys: list[int] = []
        for packet in packets(container, stream, where):
            if packet.pts is not None:
                keys += [len(times)] if packet.is_keyframe else []
                times.append(packet.pts)
        steps = set(np.diff(sorted(times)))
        if not keys or len(steps) > 1 or max(np.diff([*keys, len(times)])) > options.gop or keys[0]:
            return False
    with OpenVideo(payload, where) as (container, stream, _):
        count, turned = 0, False
        for frame in decoded(container, stream, where):
            count, turned = count + 1, turned or frame.rotation != 0
    if count != len(times) or (stream.frames and count != stream.frames):
        raise DataError(f"{count} frames decode of {len(times)} stored", where=where, fix=FIX_MEDIA)
    return not turned


def _transcode_file(media: VideoFile, options: VideoOptions, where: str, seek: bool) -> bytes:
    with OpenVideo(media.path, where) as (container, stream, _):
        source_rate = stream.average_rate or stream.guessed_rate
        if not source_rate:
            raise DataError("no frame rate: a still image or an empty stream", where=where, fix=FIX_MEDIA)
        rate = options.fps or float(source_rate)
        origin = float((stream.start_time or 0) * stream.time_base)
        if seek and media.start_seconds:
            container.seek(int((origin + media.start_seconds) / stream.time_base), stream=stream, backward=True)
        declared = None
        if media.end_seconds is not None:
            declared = media.end_seconds - _END_TOLERANCE_SECONDS
        elif stream.duration:
            declared = float(stream.duration * stream.time_base) * 0.95 - 0.5
        timed = cut(decoded(container, stream, where), media, origin, declared, where)
        slots = constant_rate(timed, rate, media.start_seconds or 0.0, float(1 / source_rate))
        return _encode(slots, rate, options, where)


def _stored_size(width: int, height: int, aspect: float, short_side: int) -> tuple[int, int]:
    """Even width and height with square pixels and the wanted short side; never enlarged."""
    wide = width * aspect
    scale = min(1.0, short_side / min(wide, height)) if short_side else 1.0
    return max(2, round(wide * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def _encode(frames: Iterator[av.VideoFrame], fps: float, options: VideoOptions, where: str) -> bytes:
    """Encode frames with x264, one thread. The BT.601 limited-range result matches what ``decode`` assumes."""
    rate = Fraction(fps).limit_denominator(1001)
    buffer, reformatter, stream = io.BytesIO(), VideoReformatter(), None
    with av.open(buffer, "w", format="mp4", options={"fflags": "bitexact"}) as output:
        for number, frame in enumerate(frames):
            if stream is None:
                aspect = float(getattr(frame, "sample_aspect_ratio", None) or 1)
                width, height = _stored_size(frame.width, frame.height, aspect, options.short_side)
                stream = _new_stream(output, rate, options, (width, height))
            rgb = reformatter.reformat(
                frame, width=width, height=height, format="rgb24", interpolation="BICUBIC", threads=1
            )
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(rgb.to_ndarray(), "rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU601,
                threads=1,
            )
            picture.pts, picture.time_base = number, 1 / rate
            output.mux(stream.encode(picture))
        if stream is None:
            raise DataError("no frame between the two times", where=where, fix="check start and end of the annotation")
        output.mux(stream.encode())
    return buffer.getvalue()


def _new_stream(output: Any, rate: Fraction, options: VideoOptions, size: tuple[int, int]) -> Any:
    settings = {"crf": str(options.crf), "preset": options.preset, "tune": "fastdecode", "flags": "+bitexact"}
    # Without cpu-independent, x264's float SIMD for macroblock trees differs between CPUs, and even between two runs
    # on one CPU (measured: 1 encoding in 30 had other bytes).
    settings["x264-params"] = "threads=1:lookahead-threads=1:sync-lookahead=0:cpu-independent=1"
    stream = output.add_stream("libx264", rate=rate, options=settings)
    stream.width, stream.height = size
    stream.pix_fmt, stream.time_base = "yuv420p", 1 / rate
    context = stream.codec_context
    context.gop_size, context.max_b_frames, context.thread_count, context.thread_type = options.gop, 0, 1, "NONE"
    return stream
