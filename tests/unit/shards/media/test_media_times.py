"""Files whose times are late, missing, jumping or only an order: every cut holds the pictures a player shows."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import av
import numpy as np
import pytest

from shards.errors import DataError
from shards.media.source import DecodingPass, OpenVideo
from shards.media.video import VideoOptions, decode, probe, transcode, transcode_pieces
from shards.schema import VideoFile
from tests.unit.shards.making import mp4
from tests.unit.shards.media_files import media, number_of, numbered

FRAMES = numbered(125)
LONG_GOP = {"g": 100, "keyint_min": 100, "sc_threshold": 0, "bf": 2}


def shown(result: bytes | DataError) -> list[int]:
    """Numbers of the stored frames."""
    assert isinstance(result, bytes), result
    return [number_of(image) for image in decode(result, probe(result).frames)]


def cut(path: Path, start: float | None = None, end: float | None = None) -> list[int]:
    return shown(transcode(VideoFile(path, start, end), VideoOptions(keep_ready=False)))


def two_streams(first: np.ndarray, second: np.ndarray, default: int) -> bytes:
    """A Matroska file with two video streams, one of which is marked as default."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        streams: list[Any] = [output.add_stream("libx264", rate=25, options={"crf": "12"}) for _ in range(2)]
        for number, (stream, images) in enumerate(zip(streams, (first, second), strict=True)):
            stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
            stream.disposition = av.stream.Disposition.default if number == default else av.stream.Disposition(0)
        for stream, images in zip(streams, (first, second), strict=True):
            for image in images:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            output.mux(stream.encode())
    return buffer.getvalue()


def with_sound(images: np.ndarray, late: float) -> bytes:
    """A Matroska file whose sound begins at 0 and whose picture begins ``late`` seconds later."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        video: Any = output.add_stream("libx264", rate=25, options={"crf": "12"})
        video.height, video.width, video.pix_fmt = *images.shape[1:3], "yuv420p"
        audio = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        for second in range(round(len(images) / 25 + late)):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
            samples.sample_rate, samples.pts, samples.time_base = 8000, second * 8000, Fraction(1, 8000)
            output.mux(audio.encode(samples))
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = number + round(25 * late), Fraction(1, 25)
            output.mux(video.encode(frame))
        output.mux(video.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("container", "codec"), [("mpegts", "libx264"), ("mpegts", "mpeg2video"), ("mpeg", "mpeg2video")]
)
def test_cuts_where_seeking_lands_late(tmp_path: Path, container: str, codec: str) -> None:
    path = tmp_path / f"a.{container}"
    options = LONG_GOP if codec == "libx264" else {"g": 50, "bf": 2, "qmin": 1, "qmax": 3}
    path.write_bytes(media(FRAMES, container, codec, **options))
    for start in (1.0, 2.0, 3.32, 4.0):
        first = round(25 * start)
        assert cut(path, start, start + 1) == list(range(first, min(first + 25, 125)))
    together = transcode_pieces([VideoFile(path, start, start + 0.4) for start in (1.0, 1.2, 3.0, 4.2)], VideoOptions())
    assert [shown(result)[0] for result in together] == [25, 30, 75, 105]


@pytest.mark.parametrize("bf", [0, 2])
def test_avi_knows_the_order_alone(tmp_path: Path, bf: int) -> None:
    path = tmp_path / "a.avi"
    path.write_bytes(media(FRAMES, "avi", "mpeg4", g=250, bf=bf, qmin=1, qmax=3))
    assert cut(path) == list(range(125))
    assert cut(path, 2.0, 3.0) == list(range(50, 75))


def test_truncated_matroska_is_no_complete_clip(tmp_path: Path) -> None:
    for name, payload in (("a.mkv", media(FRAMES, "matroska", g=12)), ("b.mkv", with_sound(FRAMES, 0.0))):
        (tmp_path / name).write_bytes(payload[: len(payload) * 6 // 10])
        with pytest.raises(DataError, match=r"the video ends at \d\.\d\d s, its header says later"):
            cut(tmp_path / name)
        with pytest.raises(DataError, match=r"the video ends at \d\.\d\d s, its header says later"):
            cut(tmp_path / name, 1.0, 4.0)  # most of it is there, but what is missing is damage and no late subtitle


def test_a_freeze_is_shown_wherever_it_is_cut(tmp_path: Path) -> None:
    kept = [*range(25), *range(75, 100), 124]  # nothing is new between 1 s and 3 s, nor between 4 s and 4.96 s
    for container in ("matroska", "mp4"):
        path = tmp_path / f"a.{container}"
        path.write_bytes(media(FRAMES[kept], container, times=[40 * number for number in kept]))
        assert cut(path, 1.4, 2.2) == [24] * 20
        assert cut(path, 0.8, 3.2) == [20, 21, 22, 23, *[24] * 51, *range(75, 80)]
        assert cut(path, 4.2, 4.8) == [99] * 15
        pieces = [VideoFile(path, start, start + 0.4) for start in (0.4, 1.2, 1.4, 2.8)]
        alone = [cut(path, piece.start_seconds, piece.end_seconds) for piece in pieces]
        assert [shown(result) for result in transcode_pieces(pieces, VideoOptions())] == alone


def test_times_that_jump_are_named_and_end_the_work(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    times = [40 * number + (200_000 if number > 9 else 0) for number in range(20)]
    path.write_bytes(media(FRAMES[:20], "matroska", times=times))
    with pytest.raises(DataError, match=r"the time stamps jump from 0\.36 s to 200\.40 s\n  fix: give the file new"):
        cut(path)
    assert cut(path, 0.0, 0.4) == list(range(10)), "a cut before the jump is whole"


def test_the_stream_that_players_show(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    for default in (0, 1):
        path.write_bytes(two_streams(FRAMES[:10], FRAMES[100:110], default))
        assert cut(path) == list(range(100 * default, 100 * default + 10))


def test_times_count_from_the_sound_where_the_picture_is_late(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(with_sound(FRAMES[:75], 2.0))
    assert cut(path) == list(range(75)), "a whole file begins with its first picture"
    assert cut(path, 3.0, 4.0) == list(range(25, 50))
    with pytest.raises(DataError, match="no frame between the two times"):
        cut(path, 0.5, 1.5)


def later(payload: bytes, frames: int) -> bytes:
    """An mp4 whose edit list leaves out so many frames at the beginning."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(payload)) as source, av.open(buffer, "w", format="mp4") as output:
        stream: Any = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.pts is not None and packet.duration is not None:
                packet.pts -= frames * packet.duration
                packet.dts -= frames * packet.duration
                packet.stream = stream
                output.mux(packet)
    return buffer.getvalue()


def test_frames_left_out_by_an_edit_list_are_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(later(mp4(numbered(50)), 15))
    assert shown(transcode(VideoFile(path), VideoOptions())) == list(range(15, 50))


class TimedStream:
    """Stands for a container and its stream: frames at given times."""

    start_time, time_base, average_rate, duration = 0, 1, 25, None
    format = SimpleNamespace(name="stub")
    metadata: ClassVar[dict[str, str]] = {}
    streams: ClassVar[list[int]] = [0, 1]
    codec_context = SimpleNamespace(has_b_frames=False)

    def __init__(self, times: list[float]) -> None:
        self.times = times

    def demux(self, _: object) -> list[Any]:
        frames = [SimpleNamespace(time=time, is_corrupt=False) for time in self.times]
        return [SimpleNamespace(decode=lambda frame=frame: [frame]) for frame in frames]


def times_of(times: list[float]) -> list[float]:
    stub: Any = TimedStream(times)
    return [seconds for seconds, frame in DecodingPass(stub, stub, "a.ts").piece(VideoFile(Path("a.ts"))) if frame]


def test_frames_that_repeat_where_recordings_were_joined_are_left_out() -> None:
    times = [0.0, 0.04, 0.08, 0.04, 0.08, 0.12]
    assert times_of(times) == pytest.approx([0.0, 0.04, 0.08, 0.12])
    with pytest.raises(DataError, match=r"the time stamps jump from 3\.96 s to 0\.00 s"):
        times_of([number / 25 for number in range(100)] * 2)
    with pytest.raises(DataError, match=r"the time stamps jump from 0\.\d\d s to"):
        times_of([number / 25 + (0.06 if number % 2 else 0.0) for number in range(40)])


def test_an_index_that_leads_too_far_spoils_one_pass_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(media(FRAMES, g=10, bf=0))
    with OpenVideo(path, "a.mp4") as (container, stream, where):
        source = DecodingPass(container, stream, where)
        list(source.piece(VideoFile(path, 0.0, 0.4), 4.0))
        monkeypatch.setattr(source, "seek", lambda start: False)
        with pytest.raises(DataError, match=r"no way to 4\.00 s by the file's index"):
            source.skip_to(4.0)
    seek = DecodingPass.seek
    monkeypatch.setattr(DecodingPass, "seek", lambda self, start: seek(self, start) and start < 3.0)
    together = transcode_pieces([VideoFile(path, start, start + 0.4) for start in (0.4, 4.0)], VideoOptions())
    assert [shown(result) for result in together] == [list(range(10, 20)), list(range(100, 110))]
