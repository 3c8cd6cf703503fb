"""Reading source media: strict single-threaded decoding, cuts by time, a constant frame rate.

``err_detect=explode`` matters: by default FFmpeg conceals damaged frames. Every FFmpeg error becomes a DataError.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import av

from shards.errors import DataError
from shards.schema import VideoFile

FIX_MEDIA = "fetch the file again, or convert it (ffmpeg -i IN OUT.mp4)"
_FIX_PATH = "fetch the file, or check the path"
_FIX_TIMES = "check the times: they may be those of another video; or fetch the file again, it may be cut off"
_EXPLODE = {"err_detect": "explode"}
_LEAST_INSIDE = 0.5  # of a segment; subtitles often outlast the video, and text without its signing is a wrong example
_SEEK_EARLY_SECONDS = 0.2  # containers seek by decoding time, which is a few frames before display time
_SLOT_EARLY = 0.25  # a frame up to a quarter slot early counts for its slot, which absorbs time stamp jitter
_TOGETHER_SECONDS = 0.1  # in most files, sound begins a little before the picture; players show no difference
_LONGEST_GAP_SECONDS = 60.0  # a still slide may last long; a longer gap is a jump of the time stamps
_BACK_SECONDS, _MOST_BACK = 1.0, 5  # a few frames may repeat where two recordings were joined
_CLOCK_TIME = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_SAME = 1e-6  # seconds; times are compared after a division

Timed: TypeAlias = "tuple[float, av.VideoFrame | None]"
"""(seconds, frame). The last one of a piece has no frame: it marks the end of the one before it."""


def no_file(path: Path) -> str:
    """Why a path is not a file that can be opened (``does not exist``); empty when it is one."""
    if path.is_file():
        return ""
    if path.is_symlink() and not path.exists():
        return "is a link that leads nowhere"
    if not path.exists():
        return "does not exist"
    return "is a folder, not a video" if path.is_dir() else "is no regular file"


def no_file_error(path: Path) -> DataError:
    """The error for a path that :func:`no_file` rejects."""
    what = no_file(path)
    fix = f"name the files in it, for example {path}/*.mp4" if path.is_dir() else _FIX_PATH
    return DataError("the file does not exist" if not path.exists() else f"this {what}", where=str(path), fix=fix)


class OutsideVideo(DataError):
    """The times of a segment lie outside the video, or more than half of it."""


class OpenVideo:
    """Open a path, bytes or an open stream for strict single-threaded decoding: ``(container, stream, where)``; FFmpeg
    errors become DataErrors."""

    def __init__(self, source: Path | bytes | BinaryIO, where: str) -> None:
        self.source, self.where = source, where
        self.container: Any = None

    def __enter__(self) -> tuple[Any, Any, str]:
        source: Any = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        source = str(source) if isinstance(source, Path) else source
        try:
            if isinstance(self.source, Path) and not self.source.stat().st_size:
                raise DataError("the file is empty", where=self.where, fix=FIX_MEDIA)
            container = av.open(source, options=dict(_EXPLODE), metadata_errors="replace")  # titles of any encoding
        except FileNotFoundError:
            raise DataError("the file does not exist", where=self.where, fix=_FIX_PATH) from None
        except (av.FFmpegError, OSError) as error:
            raise DataError(f"not a readable video ({_reason(error)})", where=self.where, fix=FIX_MEDIA) from error
        if not container.streams.video:
            kinds = ", ".join(sorted({str(stream.type) for stream in container.streams})) or "nothing"
            container.close()
            raise DataError(f"no video stream, only {kinds}", where=self.where, fix=FIX_MEDIA)
        stream = _main_stream(container)
        stream.thread_type = "NONE"
        stream.codec_context.options = dict(_EXPLODE)
        self.container = container
        return container, stream, self.where

    def __exit__(self, *_: object) -> None:
        if self.container is not None:
            self.container.close()


def _reason(error: Any) -> str:
    """The reason alone, without FFmpeg's error number."""
    return str(error.strerror or error)


def _main_stream(container: Any) -> Any:
    """The video stream that players show: no cover picture; of several, the one marked as default."""
    best = container.streams.best("video")
    films = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    return best if best in films or not films else films[0]


def packets(container: Any, stream: Any, where: str) -> Iterator[Any]:
    """Demuxed packets of one stream, without decoding."""
    try:
        yield from container.demux(stream)
    except av.FFmpegError as error:
        raise DataError(f"damaged or truncated video ({_reason(error)})", where=where, fix=FIX_MEDIA) from error


def decoded(container: Any, stream: Any, where: str, after_seek: bool = False) -> Iterator[av.VideoFrame]:
    """Decoded frames in display order.

    ``after_seek``: leave out frames shown before the first key frame; they may refer to frames before it.
    """
    demuxed = packets(container, stream, where)
    yield from decoded_packets(_without_leading(demuxed) if after_seek else demuxed, where)


def decoded_packets(demuxed: Iterable[Any], where: str) -> Iterator[av.VideoFrame]:
    """Decoded frames of packets in display order. The last packet of a stream is empty and flushes the decoder."""
    try:
        for packet in demuxed:
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise DataError(f"damaged frame at {frame.time} s", where=where, fix=FIX_MEDIA)
                yield frame
    except av.FFmpegError as error:
        raise DataError(f"damaged or truncated video ({_reason(error)})", where=where, fix=FIX_MEDIA) from error


def _without_leading(demuxed: Iterator[Any]) -> Iterator[Any]:
    first: int | None = None
    for packet in demuxed:
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
    """One pass over a media file that yields the frames of pieces in order of their starts.

    Neighbouring pieces share the decoding of the frames that lead to them. Between two pieces, the pass jumps to a key
    frame if the file's index has one after the current position.

    Times count from where a player begins: at the first picture, or at the sound if it begins clearly earlier.

    Args:
        container, stream, where: from :class:`OpenVideo`.
    """

    def __init__(self, container: Any, stream: Any, where: str) -> None:
        self.container, self.stream, self.where = container, stream, where
        self.frame_seconds = 1 / stream_rate(stream, where)
        self._numbered = container.format.name == "avi" and bool(stream.codec_context.has_b_frames)
        """Such files store decoding times, so only the order of the frames is known."""
        self._can_seek = not self._numbered and container.format.name != "mpeg"
        first = 0.0 if self._numbered else float((stream.start_time or 0) * stream.time_base)
        begin = first if container.start_time is None or self._numbered else container.start_time / av.time_base
        self.origin = begin if first - begin > _TOGETHER_SECONDS else first
        self.first = first - self.origin
        """Time of the first picture."""
        self.position = -math.inf
        """Time of the last decoded frame."""
        self._frames = self._decode()
        self._kept_frames: list[tuple[float, av.VideoFrame]] = []
        """The last frame before the next piece and, if the pieces overlap, the first frames of that piece."""

    def begin(self, media: VideoFile) -> float:
        """Where a piece begins: at its start time, or at the first picture if it has none."""
        return self.first if media.start_seconds is None else media.start_seconds

    def seek(self, start: float) -> bool:
        """Go to the key frame before ``start``; False if the media landed after it (a file with a poor index)."""
        if not self._can_seek:
            return True  # the next frames come from the beginning
        self._kept_frames, self.position = [], -math.inf
        try:
            self.container.seek(self._ticks(start), stream=self.stream, backward=True, any_frame=False)
        except av.FFmpegError:  # formats without time stamps in their packets cannot seek: read from the start
            self.container.seek(0)
            self._frames = self._decode()
            return True
        self._frames = self._decode(after_seek=True)
        first = next(self._frames, None)
        if first is None:
            return True  # no frame: reading the piece reports it
        self._frames = itertools.chain([first], self._frames)
        return first[0] <= max(start, self.first) + _SAME

    def skip_to(self, start: float) -> None:
        """Jump ahead, never back, if that saves decoding. Raises DataError if the media landed too late."""
        if not self._can_seek or (self._kept_frames and self._kept_frames[-1][0] >= start - _SAME):
            return  # the piece begins in frames that are decoded already
        entries = self.stream.index_entries
        entry = entries.search_timestamp(self._ticks(start), backward=True, any_frame=False) if len(entries) else -1
        if entry < 0:
            return
        seconds = float(entries[entry].timestamp * self.stream.time_base) - self.origin
        if seconds > self.position + self.frame_seconds and not self.seek(start):
            raise DataError(f"no way to {start:.2f} s by the file's index", where=self.where, fix=FIX_MEDIA)

    def _ticks(self, start: float) -> int:
        """Where to look for the key frame before ``start``, in the stream's own units."""
        return int((self.origin + max(0.0, start - _SEEK_EARLY_SECONDS)) / self.stream.time_base)

    def piece(self, media: VideoFile, following: float = math.inf) -> Iterator[Timed]:
        """The frames of one piece, from the one shown when it begins; checks that the media reaches its end and that
        no time stamps jump.

        Args:
            media: the piece.
            following: start of the next piece; its frames are kept if this piece overlaps it.
        """
        start, end = self.begin(media), math.inf if media.end_seconds is None else media.end_seconds
        waiting, self._kept_frames = iter(self._kept_frames), []
        before: tuple[float, av.VideoFrame] | None = None
        for item in itertools.chain(waiting, self._frames):
            seconds = item[0]
            self._keep(item, following)
            if seconds >= start - _SAME:
                if before is not None:
                    self._check_gap(max(before[0], start), min(seconds, end))
                    if before[0] < start - _SAME:
                        yield before
                if seconds >= end:
                    for rest in waiting:
                        self._keep(rest, following)
                    yield end, None
                    return
                yield item
            before = item
        self._check_end(media)
        if before is not None:
            yield min(before[0] + self.frame_seconds, end), None

    def _keep(self, item: tuple[float, av.VideoFrame], following: float) -> None:
        if item[0] < following - _SAME:
            self._kept_frames = [item]
        else:
            self._kept_frames.append(item)

    def _decode(self, after_seek: bool = False) -> Iterator[tuple[float, av.VideoFrame]]:
        back = 0
        for number, frame in enumerate(decoded(self.container, self.stream, self.where, after_seek)):
            seconds = number * self.frame_seconds if self._numbered else self._time(frame)
            if seconds <= self.position:
                back += 1
                if self.position - seconds > _BACK_SECONDS or back > _MOST_BACK + number // 100:
                    raise self._jump(self.position, seconds)
                continue
            self.position = seconds
            yield seconds, frame

    def _time(self, frame: av.VideoFrame) -> float:
        if frame.time is None:
            raise DataError(
                "frames without time stamps", where=self.where, fix="remux the file (ffmpeg -i IN -c copy OUT.mp4)"
            )
        return float(frame.time) - self.origin

    def _jump(self, last: float, seconds: float) -> DataError:
        return DataError(
            f"the time stamps jump from {last:.2f} s to {seconds:.2f} s",
            where=self.where,
            fix="give the file new ones (ffmpeg -i IN -vf setpts=N/FRAME_RATE/TB OUT.mp4), or cut around the jump",
        )

    def _check_gap(self, last: float, seconds: float) -> None:
        if seconds - last > _LONGEST_GAP_SECONDS:
            raise self._jump(last, seconds)

    def explained(self, media: VideoFile, error: DataError) -> DataError:
        """The error, or a plainer one if the piece begins after the end of the media."""
        declared, start = self._declared(), self.begin(media)
        if declared is None or start < declared:
            return error
        return OutsideVideo(
            f"the video ends at {declared:.2f} s, the segment begins at {start:.2f} s",
            where=self.where,
            fix=_FIX_TIMES,
        )

    def _check_end(self, media: VideoFile) -> None:
        """Check that the media ended where its header says, and not before most of the segment."""
        if self.position == -math.inf:
            raise DataError("no frame can be decoded", where=self.where, fix=FIX_MEDIA)
        end = math.inf if media.end_seconds is None else media.end_seconds
        if self.position < min(end - self.frame_seconds, (self._declared() or 0.0) * 0.95 - 0.5):
            raise DataError(
                f"the video ends at {self.position:.2f} s, its header says later", where=self.where, fix=_FIX_TIMES
            )
        start, over = self.begin(media), self.position + self.frame_seconds
        if end < math.inf and over - start < _LEAST_INSIDE * (end - start):
            raise OutsideVideo(
                f"the video ends at {self.position:.2f} s, the segment says later: of its {end - start:.2f} s only "
                f"{max(0.0, over - start):.2f} s lie inside",
                where=self.where,
                fix=_FIX_TIMES,
            )

    def _declared(self) -> float | None:
        """End of the video by the header of the stream, or of the file if it holds nothing else."""
        if self.stream.duration:
            return self.first + float(self.stream.duration * self.stream.time_base)
        for name, value in self.stream.metadata.items():  # Matroska, per stream: DURATION or DURATION-eng
            if name.startswith("DURATION") and (clock := _CLOCK_TIME.fullmatch(value)):
                hours, minutes, seconds = map(float, clock.groups())
                return 3600 * hours + 60 * minutes + seconds - self.origin
        alone = len(self.container.streams) == 1 and self.container.duration
        return self.container.duration / av.time_base if alone else None


def clip_slots(media: VideoFile, rate: float, frame_seconds: float) -> int:
    """Frames of a piece between two times at a constant rate, where the video has them all; at least 1."""
    assert media.end_seconds is not None
    seconds = media.end_seconds - (media.start_seconds or 0.0)
    return max(1, math.floor(seconds * rate + min(_SLOT_EARLY, frame_seconds * rate / 2)))


def constant_rate(timed: Iterator[Timed], rate: float, start: float, frame_seconds: float) -> Iterator[av.VideoFrame]:
    """Frames at a constant rate: slot k shows the first frame that falls into it, or else the frame before.

    The first frame also fills the gap before it; the last one is shown until the given end.
    """
    early = min(_SLOT_EARLY, frame_seconds * rate / 2)  # fast media: the frame nearest to the slot's time
    shown: av.VideoFrame | None = None
    done = 0
    for seconds, frame in timed:
        slot = math.floor((seconds - start) * rate + early)
        if frame is None:
            yield from itertools.repeat(shown, slot - done if shown is not None else 0)
            return
        if slot >= done:
            yield from itertools.repeat(shown or frame, slot - done)
            yield frame
            done = slot + 1
        shown = frame
