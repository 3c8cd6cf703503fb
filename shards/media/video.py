"""Video, pure per sample: probe, transcode to the stored form, decode. PyAV, one thread.

The stored form is H.264 with a short GOP and no B-frames: on signing at 256 px it decodes faster than anything but
JPEG at an eighth of the bytes, and a 16-frame piece costs one GOP. One thread per call keeps bytes deterministic;
parallelism comes from processes.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from shards.errors import DataError, OptionError
from shards.media.frame_folder import folder_frames
from shards.media.margin import margin_frames, widened, with_margins
from shards.media.picture import Pictures, stored_size, upright
from shards.media.source import (
    FIX_MEDIA,
    DecodingPass,
    OpenVideo,
    clip_slots,
    constant_rate,
    decoded,
    decoded_packets,
    no_file,
    no_file_error,
    packets,
)
from shards.media.square import USUAL, Placement, rgb
from shards.schema import FrameFolder, VideoFile

_FURTHER_BACK_SECONDS = 30.0
_ZEROS = b"\0" * 15
"""H.264 has no three zero bytes in a row inside a unit; decoders show a zeroed part as a picture without an error."""


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
    """Pixels of the shorter side; smaller media is not enlarged. 0 keeps the size."""
    fps: float = 25.0
    """Constant frame rate; faster media is decimated, slower media repeats frames. 0 keeps the source rate."""
    crf: int = 20
    gop: int = 12
    """Most frames between two key frames: the cost of reading from the middle."""
    preset: str = "medium"
    keep_ready: bool = True
    """Store files that already have this form unchanged instead of encoding them again."""

    def __post_init__(self) -> None:
        if self.short_side < 0 or self.fps < 0 or self.gop < 1 or not 0 <= self.crf <= 51:
            raise OptionError(
                f"short_side {self.short_side}, fps {self.fps}: need >= 0; gop {self.gop}: >= 1; crf {self.crf}: 0..51",
                where="video options",
                fix="correct the option",
            )

    @classmethod
    def from_record(cls, values: Mapping[str, Any]) -> VideoOptions:
        """The options of a manifest or an export. Raises TypeError for unknown names."""
        known = {**values}
        known.pop("validate", None)  # how files were checked; does not change a picture
        return cls(**known)

    def record(self) -> dict[str, Any]:
        """The options for a manifest: every field, and how files stored unchanged were checked."""
        return asdict(self) | {"validate": "full"}  # sets of 0.1.0 have it, and records are compared

    def accepts_size(self, width: int, height: int) -> bool:
        """Whether video of this size is stored without scaling."""
        return not (self.short_side and min(width, height) > self.short_side) and width % 2 == height % 2 == 0

    def accepts_rate(self, fps: Fraction | None) -> bool:
        """Whether video of this rate is stored at the same rate."""
        return not (self.fps and fps != Fraction(self.fps).limit_denominator(1001))


def probe(source: Path | bytes) -> VideoInfo:
    """Read the container header of a file or of bytes. Raises DataError when there is no readable video stream."""
    with OpenVideo(source, str(source) if isinstance(source, Path) else "") as (container, stream, where):
        frames = stream.frames or sum(packet.size > 0 for packet in packets(container, stream, where))
        return _info(stream, frames)


def _info(stream: Any, frames: int) -> VideoInfo:
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    seconds = float(stream.duration * stream.time_base) if stream.duration else frames / fps if fps else 0.0
    context = stream.codec_context
    return VideoInfo(frames, fps, context.width, context.height, seconds, context.name)


def transcode(media: VideoFile | FrameFolder, options: VideoOptions) -> bytes:
    """Cut, crop, resize and encode one segment to the stored form; the same input gives the same bytes.

    Returns:
        An mp4 file: H.264, yuv420p, limited range, constant ``options.fps``, a key frame at least every
        ``options.gop`` frames, no B-frames, no audio; the colour matrix of the source, named in the stream.

    Raises:
        DataError: media missing, truncated or damaged, no video stream, or no frame between the two times.
    """
    if isinstance(media, FrameFolder):
        rate, where = options.fps or media.fps, str(media.path)
        slots = constant_rate(folder_frames(media), rate, 0.0, 1 / media.fps)
        return _encode(slots, rate, Pictures(None, options.short_side, 1, where), options)
    if media.path.is_file() and (ready := ready_payload(media, options)) is not None:
        return ready[0]
    [result] = transcode_pieces([media], options)
    if isinstance(result, DataError):
        raise result
    return result


def transcode_pieces(
    pieces: Sequence[VideoFile], options: VideoOptions, margin_seconds: float = 0.0
) -> list[bytes | DataError]:
    """Pieces of one file in order of their starts, encoded; stretches they share are decoded once.

    The bytes of a piece do not depend on the others. A piece that cannot be used is a DataError in its place.

    ``margin_seconds``: stored before and after every piece (:mod:`shards.media.margin`).
    """
    path = pieces[0].path
    if no_file(path):
        return [no_file_error(path) for _ in pieces]
    results: list[bytes | DataError] = []
    while len(results) < len(pieces):
        rest = pieces[len(results) :]
        encoded = _transcode_pass(rest, options, 0.0, margin_seconds)
        if isinstance(encoded[-1], DataError):
            if len(encoded) > 1:
                encoded.pop()  # the damage may lie between the pieces: try this one again alone
            elif rest[0].start_seconds:
                # the key frame before the piece may be unusable, or the file's index poor: decode from further back
                [again] = _transcode_pass(rest[:1], options, _FURTHER_BACK_SECONDS, margin_seconds)
                encoded = encoded if isinstance(again, DataError) else [again]
        results += encoded
    return results


def decode(
    payload: bytes,
    frames: int,
    wanted: Sequence[int] | None = None,
    size: int | None = None,
    where: str = "",
    placement: Placement = USUAL,
) -> np.ndarray:
    """Decode a stored video to RGB.

    Args:
        payload: the mp4 bytes.
        frames: number of frames in the index; any other number is an error.
        wanted: increasing frame numbers to return; None = all.
        size: resize the short side to this many pixels (fast bilinear) and crop the centre square; None = stored size.
        where: shard and key for error messages.
        placement: with ``size``: another square than the one at the centre, the same in all frames.

    Returns:
        uint8 [T, H, W, 3] with T = number of wanted frames.

    Raises:
        DataError: damaged bytes, wrong number of frames, or a wanted frame that does not exist.
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
        reformatter = VideoReformatter()

        def image(frame: av.VideoFrame) -> np.ndarray:
            return rgb(frame, reformatter, size, placement)

        images, count = _collect(decoded(container, stream, where), first, order, image, early)
    if not early and count != frames:
        raise _count_error(count, frames, where)
    if len(images) != len(order):
        raise _count_error(count, frames, where)
    return np.stack(images)


def _collect(
    frames: Iterator[av.VideoFrame],
    first: int,
    order: list[int],
    image: Callable[[av.VideoFrame], np.ndarray],
    early: bool,
) -> tuple[list[np.ndarray], int]:
    """The wanted frames as images, and the number of decoded frames; ``early`` stops after the last wanted one."""
    images: list[np.ndarray] = []
    number = first
    for frame in frames:
        if len(images) < len(order) and number == order[len(images)]:
            images.append(image(frame))
        number += 1
        if early and len(images) == len(order):
            break
    return images, number


def _count_error(counted: int, frames: int, where: str) -> DataError:
    return DataError(f"{counted} frames, the index says {frames}", where=where, fix="rebuild this shard set")


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


def ready_payload(media: VideoFile, options: VideoOptions) -> tuple[bytes, VideoInfo] | None:
    """A file that already has the stored form; None when it must be encoded. Damage raises DataError."""
    payload_or_reason = ready_or_why(media, options)
    return None if isinstance(payload_or_reason, str) else payload_or_reason


def ready_or_why(media: VideoFile, options: VideoOptions) -> tuple[bytes, VideoInfo] | str:
    """A file that already has the stored form, or a reason of ``shards.build.encoded.REASONS`` why it must be encoded.

    The reason is empty for a part of the file or picture and when ``keep_ready`` is off. Damage raises DataError.
    """
    if not options.keep_ready or (media.start_seconds, media.end_seconds, media.crop) != (None, None, None):
        return ""
    with OpenVideo(media.path, str(media.path)) as (container, stream, where):
        if reason := _other_form(container, stream, options):
            return reason
        demuxed = list(packets(container, stream, where))
        if any(packet.is_discard for packet in demuxed):
            return "edit_list"
        if holes := [place for place, packet in enumerate(demuxed) if _ZEROS in bytes(packet)]:
            raise DataError(f"damaged or truncated video: zeros in frame {holes[0]}", where=where, fix=FIX_MEDIA)
        times = [packet.pts for packet in demuxed if packet.pts is not None]
        keys = [place for place, packet in enumerate(demuxed) if packet.is_keyframe and packet.pts is not None]
        if len(set(np.diff(sorted(times)))) > 1:
            return "uneven_times"
        if not keys or keys[0] or max(np.diff([*keys, len(times)])) > options.gop:
            return "key_frames"
        count, turned = 0, False
        for frame in decoded_packets(demuxed, where):
            count, turned = count + 1, turned or bool(upright(frame)) or frame.interlaced_frame
        if count != len(times) or (stream.frames and len(times) != stream.frames):
            counts = f"{count} frames decode of {len(times)} stored, the header says {stream.frames or 'nothing'}"
            raise DataError(f"damaged or truncated video: {counts}", where=where, fix=FIX_MEDIA)
        return "turned" if turned else (media.path.read_bytes(), _info(stream, len(times)))


def _other_form(container: Any, stream: Any, options: VideoOptions) -> str:
    """What differs from the stored form according to the header; empty if nothing does."""
    context = stream.codec_context
    size = context.width, context.height
    differences = {
        "codec": (context.name, context.pix_fmt) != ("h264", "yuv420p"),
        "container": "mp4" not in container.format.name,
        "size": not options.accepts_size(*size),
        "rate": not options.accepts_rate(stream.average_rate),
        # scalers that keep sides even write aspects such as 1136:1135, which do not change the size
        "pixels": stored_size(*size, float(stream.sample_aspect_ratio or 1), options.short_side) != size,
        "late_start": bool(stream.start_time),
        "streams": len(container.streams) > 1,
    }
    return next((name for name, differs in differences.items() if differs), "")


def _transcode_pass(
    pieces: Sequence[VideoFile], options: VideoOptions, back: float, margin_seconds: float
) -> list[bytes | DataError]:
    """The pieces up to and including the first unusable one.

    ``back``: decode from this many seconds before the first piece, and from further back if the file's index has no
    key frame there.
    """
    results: list[bytes | DataError] = []
    source = None
    try:
        with OpenVideo(pieces[0].path, str(pieces[0].path)) as (container, stream, where):
            source = DecodingPass(container, stream, where)
            rate = options.fps or 1 / source.frame_seconds
            margin = margin_frames(margin_seconds, rate)
            wide = [widened(piece, margin, rate) for piece in pieces] if margin else pieces
            for number, (piece, clip) in enumerate(zip(wide, pieces, strict=True)):
                start = source.begin(piece)
                if number:
                    source.skip_to(start)
                elif start - back > source.first and not source.seek(start - back):
                    return _transcode_pass(pieces, options, math.inf if back else _FURTHER_BACK_SECONDS, margin_seconds)
                following = [source.begin(later) for later in wide[number + 1 : number + 2]]
                timed = source.piece(piece, *following)
                slots = constant_rate(timed, rate, start, source.frame_seconds)
                if margin:
                    length = clip_slots(clip, rate, source.frame_seconds)
                    slots = with_margins(slots, length, margin)
                pictures = Pictures(piece.crop, options.short_side, stream.sample_aspect_ratio, where)
                results.append(_encode(slots, rate, pictures, options))
    except DataError as error:
        results.append(source.explained(pieces[len(results)], error) if source is not None else error)
    return results


def _encode(frames: Iterator[av.VideoFrame], fps: float, pictures: Pictures, options: VideoOptions) -> bytes:
    """Encode frames with x264, one thread."""
    return encode_pictures(map(pictures, frames), fps, options, pictures.where)


def encode_pictures(pictures: Iterable[av.VideoFrame], fps: float, options: VideoOptions, where: str) -> bytes:
    """Stored pictures (:class:`shards.media.picture.Pictures`) as the mp4 file of :func:`transcode`.

    Raises DataError when there is none.
    """
    rate = Fraction(fps).limit_denominator(1001)
    buffer, stream = io.BytesIO(), None
    with av.open(buffer, "w", format="mp4", options={"fflags": "bitexact"}) as output:
        for number, picture in enumerate(pictures):
            if stream is None:
                stream = _new_stream(output, rate, options, picture)
            picture.pts, picture.time_base = number, 1 / rate
            output.mux(stream.encode(picture))
        if stream is None:
            raise DataError("no frame between the two times", where=where, fix="check start and end")
        output.mux(stream.encode())
    return buffer.getvalue()


def _new_stream(output: Any, rate: Fraction, options: VideoOptions, first: av.VideoFrame) -> Any:
    settings = {"crf": str(options.crf), "preset": options.preset, "tune": "fastdecode", "flags": "+bitexact"}
    settings["a53cc"] = "0"  # do not copy broadcast captions into the stream
    # Without cpu-independent, x264's float SIMD for macroblock trees differs between CPUs, and even between two runs
    # on one CPU (measured: 1 encoding in 30 had other bytes).
    settings["x264-params"] = "threads=1:lookahead-threads=1:sync-lookahead=0:cpu-independent=1"
    stream = output.add_stream("libx264", rate=rate, options=settings)
    stream.width, stream.height = first.width, first.height
    stream.pix_fmt, stream.time_base = "yuv420p", 1 / rate
    context = stream.codec_context
    context.gop_size, context.max_b_frames, context.thread_count, context.thread_type = options.gop, 0, 1, "NONE"
    context.color_range, context.colorspace = first.color_range, first.colorspace
    context.color_primaries, context.color_trc = first.color_primaries, first.color_trc
    return stream
