"""shards.media.video: the stored form, its determinism, strict decoding, and every way media can be broken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.errors import DataError
from shards.media.source import DecodingPass, constant_rate, decoded
from shards.media.video import VideoOptions, decode, probe, transcode
from shards.schema import FrameFolder, VideoFile
from tests.unit.shards.making import audio_only, bar_position, mp4, pictures


@pytest.fixture(scope="module")
def stored() -> bytes:
    return mp4(pictures(40))


def write(folder: Path, payload: bytes, name: str = "clip.mp4") -> Path:
    path = folder / name
    path.write_bytes(payload)
    return path


def assert_same_bars(found: np.ndarray, expected: np.ndarray) -> None:
    shifts = [abs(bar_position(a) - bar_position(b)) for a, b in zip(found, expected, strict=True)]
    assert max(shifts) <= 1, shifts


def key_frames(payload: bytes, folder: Path) -> list[int]:
    with av.open(str(write(folder, payload, "keys.mp4"))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    return [number for number, packet in enumerate(packets) if packet.is_keyframe]


def test_probe_reads_path_and_bytes_alike(tmp_path: Path, stored: bytes) -> None:
    info = probe(stored)
    assert (info.frames, info.fps, info.width, info.height, info.codec) == (40, 25.0, 64, 48, "h264")
    assert info.duration_seconds == pytest.approx(1.6)
    assert probe(write(tmp_path, stored)) == info


def test_ready_file_is_stored_unchanged(tmp_path: Path, stored: bytes) -> None:
    assert transcode(VideoFile(write(tmp_path, stored)), VideoOptions()) == stored
    assert transcode(VideoFile(write(tmp_path, stored)), VideoOptions(keep_ready=False)) != stored


@pytest.mark.parametrize("case", ["long_gop", "audio", "fps", "large", "yuv444", "cut"], ids=lambda case: case)
def test_other_files_are_encoded_again(tmp_path: Path, case: str) -> None:
    options = VideoOptions(short_side=32) if case == "large" else VideoOptions()
    payload = mp4(
        pictures(30),
        fps=50 if case == "fps" else 25,
        audio=case == "audio",
        g=250 if case == "long_gop" else 12,
        pix_fmt="yuv444p" if case == "yuv444" else "yuv420p",
    )
    media = VideoFile(write(tmp_path, payload), 0.0 if case == "cut" else None, 0.4 if case == "cut" else None)
    result = transcode(media, options)
    info = probe(result)
    assert result != payload and info.fps == 25.0
    assert info.frames == {"fps": 15, "cut": 10}.get(case, 30)
    assert (info.width, info.height) == ((42, 32) if case == "large" else (64, 48))
    assert max(np.diff([*key_frames(result, tmp_path), info.frames])) <= 12
    with av.open(str(write(tmp_path, result, "again.mp4"))) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    assert transcode(media, options) == result, "encoding is not deterministic"
    assert transcode(VideoFile(write(tmp_path, result)), options) == result, "our own result is not in stored form"


def test_transcode_keeps_content_and_order(tmp_path: Path) -> None:
    images = pictures(30)
    result = transcode(VideoFile(write(tmp_path, mp4(images, g=250))), VideoOptions(keep_ready=False))
    found = decode(result, 30)
    assert_same_bars(found, images)
    assert np.abs(found.astype(int) - images).mean() < 6


def test_colours_of_tagged_and_full_range_sources_survive(tmp_path: Path) -> None:
    image = np.full((4, 48, 64, 3), (200, 40, 10), np.uint8)
    for pix_fmt in ("yuv420p", "yuvj420p", "yuv444p"):
        path = write(tmp_path, mp4(image, pix_fmt=pix_fmt))
        result = decode(transcode(VideoFile(path), VideoOptions(keep_ready=False)), 4)
        source = decode(path.read_bytes(), 4)
        assert np.abs(result[2, 24, 32].astype(int) - source[2, 24, 32]).max() <= 6, pix_fmt


def test_cut_takes_the_frames_between_the_two_times(tmp_path: Path) -> None:
    images = pictures(100)
    path = write(tmp_path, mp4(images, g=25, bf=2))
    found = decode(transcode(VideoFile(path, 2.0, 3.2), VideoOptions()), 30)
    assert_same_bars(found, images[50:80])


def test_decimates_and_repeats_frames(tmp_path: Path) -> None:
    images = pictures(40)
    fast = decode(transcode(VideoFile(write(tmp_path, mp4(images, fps=50))), VideoOptions()), 20)
    assert [bar_position(image) // 4 for image in fast[:6]] == [bar_position(image) // 4 for image in images[:12:2]]
    slow = transcode(VideoFile(write(tmp_path, mp4(images[:24], fps=24))), VideoOptions())
    assert probe(slow).frames == 25


def test_variable_rate_becomes_constant(tmp_path: Path) -> None:
    times = [0, 40, 80, 400, 440, 480]
    result = transcode(VideoFile(write(tmp_path, mp4(pictures(6), times=times))), VideoOptions())
    assert probe(result).fps == 25.0
    found = [bar_position(image) // 4 for image in decode(result, probe(result).frames)]
    assert found[:13] == [0, 1, *[2] * 8, 3, 4, 5]


@given(
    st.lists(st.floats(0.001, 0.3), min_size=1, max_size=40), st.sampled_from([12.5, 25.0, 30.0]), st.floats(0.0, 2.0)
)
@settings(max_examples=100, deadline=None)
def test_constant_rate_fills_every_slot_in_order(gaps: list[float], rate: float, start: float) -> None:
    times = start + np.cumsum(gaps)
    timed: Any = iter([*((time, number) for number, time in enumerate(times)), (times[-1] + 0.04, None)])
    slots: list[Any] = list(constant_rate(timed, rate, start, 0.04))
    assert slots == sorted(slots)
    assert abs(len(slots) - (times[-1] + 0.04 - start) * rate) <= 1.26
    assert len(slots) == 0 or slots[-1] == len(times) - 1 or times[-1] - times[-2] < 1 / rate


def test_frame_folder_ignores_stray_files(tmp_path: Path) -> None:
    images = pictures(12)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"images{number:04d}.png")
    (tmp_path / "createDnnTrainingLabels-profile.py.lprof").write_bytes(b"x")
    result = transcode(FrameFolder(tmp_path, "*", 25.0), VideoOptions())
    found = decode(result, 12)
    assert_same_bars(found, images)
    assert probe(transcode(FrameFolder(tmp_path, "*.png", 50.0), VideoOptions())).frames == 6


def test_odd_sizes_become_even_and_small_media_is_not_enlarged(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(pictures(1, 53, 37)[0]).save(tmp_path / f"{number}.png")
    info = probe(transcode(FrameFolder(tmp_path, "*.png", 25.0), VideoOptions(short_side=256)))
    assert (info.width, info.height) == (52, 36)


def test_decode_wanted_frames_equal_full_decode(stored: bytes) -> None:
    everything = decode(stored, 40)
    assert everything.shape == (40, 48, 64, 3) and everything.dtype == np.uint8
    for wanted in ([0], [39], [11, 12, 13], [25, 26, 30], [0, 20, 39], list(range(24, 36))):
        assert (decode(stored, 40, wanted) == everything[wanted]).all(), wanted


def test_decode_wanted_frames_of_variable_rate_media() -> None:
    payload = mp4(pictures(30), times=[number * 40 + (number > 10) * 500 for number in range(30)])
    everything = decode(payload, 30)
    assert (decode(payload, 30, [13, 20]) == everything[[13, 20]]).all()


@pytest.mark.parametrize("size", [32, 48, 56])
def test_decode_resizes_and_crops_the_centre(stored: bytes, size: int) -> None:
    assert decode(stored, 40, [3, 4], size=size).shape == (2, size, size, 3)


@pytest.mark.parametrize("wanted", [[], [3, 3], [5, 4], [-1], [40]])
def test_decode_refuses_impossible_frames(stored: bytes, wanted: list[int]) -> None:
    with pytest.raises(DataError, match=r"shard:key: wanted frames .* are not increasing"):
        decode(stored, 40, wanted, where="shard:key")


def test_decode_refuses_another_frame_count(stored: bytes) -> None:
    for frames, wanted in ((41, None), (39, None), (41, [0])):
        with pytest.raises(DataError, match=f"s:k: 40 frames, the index says {frames}"):
            decode(stored, frames, wanted, where="s:k")


def test_decode_raises_on_flipped_bytes() -> None:
    payload, rng = mp4(pictures(20)), np.random.default_rng(1)
    first, last = payload.index(b"mdat") + 700, payload.index(b"moov") - 60
    for position in rng.integers(first, last, 10):
        damaged = bytearray(payload)
        damaged[position : position + 50] = rng.integers(0, 255, 50, dtype=np.uint8).tobytes()
        with pytest.raises(DataError, match=r"s:k: damaged (or truncated video|frame at)"):
            decode(bytes(damaged), 20, where="s:k")


def test_decoding_the_same_bytes_is_repeatable_and_so_is_encoding(tmp_path: Path) -> None:
    media = VideoFile(write(tmp_path, mp4(pictures(30), g=250)))
    results = {transcode(media, VideoOptions()) for _ in range(60)}
    assert len(results) == 1, "x264 gives other bytes from time to time"


class StubFrame:
    is_corrupt, time = True, None


class StubPacket:
    pts = 0

    def decode(self) -> list[StubFrame]:
        return [StubFrame()]


class StubContainer:
    start_time, time_base, average_rate = 0, 1, 25
    format = SimpleNamespace(name="stub")

    def demux(self, _: object) -> list[StubPacket]:
        return [StubPacket()]


def test_concealed_damage_and_missing_time_stamps(monkeypatch: pytest.MonkeyPatch) -> None:
    container = StubContainer()
    with pytest.raises(DataError, match=r"s:k: damaged frame at"):
        list(decoded(container, None, "s:k"))
    monkeypatch.setattr(StubFrame, "is_corrupt", False)
    with pytest.raises(DataError, match=r"s:k: frames without time stamps\n  fix: remux the file"):
        list(DecodingPass(container, container, "s:k").piece(VideoFile(Path("x"))))


def test_zero_length_and_garbage_files(tmp_path: Path) -> None:
    for payload, what in ((b"", "the file is empty"), (b"not a video" * 100, r"not a readable video \(Invalid data")):
        path = write(tmp_path, payload)
        with pytest.raises(DataError, match=rf"clip\.mp4: {what}"):
            transcode(VideoFile(path), VideoOptions())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.mp4: the file does not exist\n  fix: fetch"):
        transcode(VideoFile(tmp_path / "gone.mp4"), VideoOptions())
    with pytest.raises(DataError, match=r"gone\.mp4: the file does not exist"):
        probe(tmp_path / "gone.mp4")


def test_audio_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no video stream, only audio"):
        transcode(VideoFile(write(tmp_path, audio_only())), VideoOptions())


@pytest.mark.parametrize("keep_ready", [True, False])
def test_truncated_video(tmp_path: Path, keep_ready: bool) -> None:
    payload = mp4(np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8), movflags="faststart")
    whole = write(tmp_path, payload)
    fast = tmp_path / "fast.mp4"
    with av.open(str(whole)) as source, av.open(str(fast), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    complete = fast.read_bytes()
    for keep in (0.5, 0.9):
        fast.write_bytes(complete[: int(len(complete) * keep)])
        with pytest.raises(DataError, match=r"fast\.mp4: (damaged|not a readable|the video ends|\d+ frames decode)"):
            transcode(VideoFile(fast), VideoOptions(keep_ready=keep_ready))
    whole.write_bytes(payload[: len(payload) // 2])
    with pytest.raises(DataError, match="not a readable video"):
        transcode(VideoFile(whole), VideoOptions(keep_ready=keep_ready))


def test_cut_outside_the_media(tmp_path: Path, stored: bytes) -> None:
    path = write(tmp_path, stored)
    with pytest.raises(DataError, match=r"the video ends at 1\.60 s, the segment begins at 5\.00 s"):
        transcode(VideoFile(path, 5.0, 8.0), VideoOptions())
    with pytest.raises(DataError, match=r"the video ends at 1\.56 s, the segment says later"):
        transcode(VideoFile(path, 1.0, 8.0), VideoOptions())
    with pytest.raises(DataError, match="no frame between the two times\n  fix: check start and end"):
        transcode(VideoFile(path, 1.0, 0.5), VideoOptions())
    assert probe(transcode(VideoFile(path, 1.0, 2.0), VideoOptions())).frames == 15, "a subtitle may outlast the video"


def test_broken_frame_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such frame folder"):
        transcode(FrameFolder(tmp_path / "gone", "*.png", 25.0), VideoOptions())
    with pytest.raises(DataError, match=r"no image matches \*\.png"):
        transcode(FrameFolder(tmp_path, "*.png", 25.0), VideoOptions())
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    Image.fromarray(pictures(1, 32, 32)[0]).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b\.png: \(32, 32\) pixels, the first frame has \(48, 64\)"):
        transcode(FrameFolder(tmp_path, "*.png", 25.0), VideoOptions())
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"b\.png: not a readable image"):
        transcode(FrameFolder(tmp_path, "*.png", 25.0), VideoOptions())


def test_wrong_options() -> None:
    with pytest.raises(DataError, match="video options: short_side -1"):
        VideoOptions(short_side=-1)
