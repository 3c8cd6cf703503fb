"""Real files of every kind a corpus may hold: each is stored with the right frames, colours and size, or named."""

from __future__ import annotations

import io
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.build.prepare import PreparedVideo, Skip, prepare_videos
from shards.errors import DataError
from shards.media.frame_folder import MissingFrames, frame_files
from shards.media.picture import Pictures, crop_box, stored_size
from shards.media.source import OutsideVideo
from shards.media.video import VideoOptions, decode, probe, ready_payload, transcode, transcode_pieces
from shards.schema import Crop, FrameFolder, Segment, VideoFile
from tests.unit.shards.making import audio_only, bar_position, mp4, pictures
from tests.unit.shards.media_files import (
    COLOURS,
    box_order,
    broken_stsz,
    displayed,
    media,
    number_of,
    numbered,
    patch_colours,
    patches,
    remuxed,
    rotated,
)

AGAIN = VideoOptions(keep_ready=False)
WIDE = VideoOptions(keep_ready=False, short_side=0)


def stored(folder: Path, payload: bytes, options: VideoOptions = AGAIN, name: str = "clip.mp4") -> np.ndarray:
    """The frames of the stored form of a file."""
    (folder / name).write_bytes(payload)
    result = transcode(VideoFile(folder / name), options)
    return decode(result, probe(result).frames)


def error_of(folder: Path, payload: bytes, name: str = "clip.mp4") -> DataError:
    (folder / name).write_bytes(payload)
    with pytest.raises(DataError) as caught:
        transcode(VideoFile(folder / name), VideoOptions())
    return caught.value


def off(found: np.ndarray, expected: Any = COLOURS) -> float:
    return float(np.abs(patch_colours(found) - np.array(expected)).max())


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p10le", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize(("matrix", "full"), [("ITU601", False), ("ITU709", False), ("ITU709", True), ("ITU601", True)])
def test_colours_survive_every_matrix_range_and_depth(tmp_path: Path, pix_fmt: str, matrix: str, full: bool) -> None:
    payload = media(patches(3), pix_fmt=pix_fmt, matrix=matrix, full=full)
    found = stored(tmp_path, payload)
    assert off(found[1]) <= 9, patch_colours(found[1])


def test_high_dynamic_range_keeps_its_matrix(tmp_path: Path) -> None:
    payload = media(
        patches(3), codec="libx265", pix_fmt="yuv420p10le", matrix="BT2020", **{"x265-params": "log-level=0"}
    )
    assert off(stored(tmp_path, payload)[1]) <= 9


def test_untagged_high_definition_is_bt709(tmp_path: Path) -> None:
    payload = media(patches(2, 1280, 720), matrix="ITU709", tagged=False, preset="ultrafast")
    assert off(stored(tmp_path, payload)[1]) <= 9
    assert off(stored(tmp_path, payload, WIDE)[1]) <= 9
    assert off(decode(payload, 2, [1])[0]) <= 9, "the same file kept as it is"


@pytest.mark.parametrize(("container", "codec", "name"), [("gif", "gif", "a.gif"), ("webm", "libvpx-vp9", "a.webm")])
def test_gif_and_webm(tmp_path: Path, container: str, codec: str, name: str) -> None:
    pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
    found = stored(tmp_path, media(patches(10), container, codec, pix_fmt), name=name)
    assert found.shape == (10, 80, 140, 3)
    assert off(found[4]) <= (45 if codec == "gif" else 12)


def test_a_picture_that_cannot_be_converted_is_named() -> None:
    frame = av.VideoFrame(64, 48, "bayer_rggb16le")

    class Refusing:
        def reformat(self, *_: Any, **__: Any) -> None:
            raise av.FFmpegError(95, "Operation not supported")

    pictures_of = Pictures(None, 0, 1, "clip.mp4")
    pictures_of._reformatter = Refusing()  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"a bayer_rggb16le frame of 64x48 pixels cannot be converted .*\n  fix: conv"):
        pictures_of(frame)


def test_rgb_video(tmp_path: Path) -> None:
    assert off(stored(tmp_path, media(patches(3), codec="libx264rgb", pix_fmt="rgb24", crf=5))[1]) <= 9


def test_120_fps_and_a_single_frame(tmp_path: Path) -> None:
    found = stored(tmp_path, media(pictures(48), fps=120))
    assert len(found) == 10
    positions = [bar_position(image) for image in found]
    assert [later - earlier for earlier, later in itertools.pairwise(positions[:3])] == pytest.approx([19, 19], abs=2)
    assert len(stored(tmp_path, media(patches(1)))) == 1


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p10le"])
def test_phones_store_portrait_video_turned(tmp_path: Path, degrees: int, pix_fmt: str) -> None:
    upright = patches(3)
    lying = np.ascontiguousarray(np.rot90(upright, degrees // 90, axes=(1, 2)))
    found = stored(tmp_path, rotated(media(lying, pix_fmt=pix_fmt), degrees))
    assert found.shape == (3, 80, 140, 3)
    assert off(found[1]) <= 9 and found[1][3, 3].min() > 150, "the white line is at the top left"


AXES = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("axes", AXES)
def test_turned_and_mirrored_pictures_are_stored_upright(tmp_path: Path, axes: tuple[int, int, int, int]) -> None:
    upright = numbered(3)[2:]
    a, b, c, d = axes
    stored_as = upright if a or d else upright.transpose(0, 2, 1, 3)
    # the column x of the stored picture is shown at a * x + c * y, the row y at b * x + d * y
    stored_as = stored_as[:, :, :: a or b][:, :: d or c]
    found = stored(tmp_path, displayed(media(np.ascontiguousarray(stored_as)), axes))
    assert found.shape == upright.shape and number_of(found[0]) == 2


def test_one_field_of_interlaced_pictures_is_stored(tmp_path: Path) -> None:
    first, second = numbered(43)[41:]
    woven = first.copy()
    woven[1::2] = second[1::2]
    payload = media(np.stack([woven] * 3), "matroska", "mpeg2video", flags="+ilme+ildct", qmin=1, qmax=2)
    found = stored(tmp_path, payload, name="a.mkv")
    assert found.shape == (3, 64, 128, 3) and [number_of(image) for image in found] == [41] * 3
    assert np.abs(found[1].astype(int) - first).mean() < 8
    right = VideoFile(tmp_path / "a.mkv", crop=Crop(0.5, 0.0, 1.0, 1.0))
    cropped = decode(transcode(right, AGAIN), 3)[1]
    assert cropped.shape == (64, 64, 3) and np.abs(cropped.astype(int) - first[:, 64:]).mean() < 8


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    found = stored(tmp_path, media(patches(2, 70, 80), aspect=2))
    assert found.shape == (2, 80, 140, 3) and off(found[1]) <= 12
    lying = np.ascontiguousarray(np.rot90(patches(2, 140, 40), 1, axes=(1, 2)))
    assert stored(tmp_path, rotated(media(lying, aspect=2), 90)).shape == (2, 40, 70, 3)


@pytest.mark.parametrize(("width", "height"), [(141, 81), (141, 80), (140, 81)])
def test_odd_sizes(tmp_path: Path, width: int, height: int) -> None:
    found = stored(tmp_path, media(patches(2, width, height), pix_fmt="yuv444p"))
    assert found.shape[1:3] == stored_size(width, height, 1, 256)[::-1] and off(found[1]) <= 9


def test_index_at_the_end_at_the_front_and_no_duration(tmp_path: Path) -> None:
    end = media(pictures(30))
    front = remuxed(end, movflags="faststart")
    assert box_order(end).index("moov") > box_order(end).index("mdat")
    assert box_order(front).index("moov") < box_order(front).index("mdat")
    live = remuxed(end, "matroska", live="1")
    with av.open(io.BytesIO(live)) as container:
        assert container.duration is None and container.streams.video[0].duration is None
    expected = stored(tmp_path, end)
    for payload, name in ((front, "a.mp4"), (live, "a.mkv"), (remuxed(end, "mpegts"), "a.ts")):
        assert np.array_equal(stored(tmp_path, payload, name=name), expected), name


def test_cuts_from_files_without_an_index(tmp_path: Path) -> None:
    payload, images = media(pictures(100), g=25), pictures(100)
    for container in ("matroska", "mpegts"):
        path = tmp_path / f"a.{container}"
        path.write_bytes(remuxed(payload, container, **({"live": "1"} if container == "matroska" else {})))
        found = decode(transcode(VideoFile(path, 2.0, 3.0), VideoOptions()), 25)
        assert [bar_position(image) for image in found] == pytest.approx(
            [bar_position(image) for image in images[50:75]], abs=1
        )


def test_variable_rate_from_a_screen_recorder(tmp_path: Path) -> None:
    times = [0, 33, 66, 500, 533, 1500, 1533]
    found = stored(tmp_path, media(pictures(7), "matroska", times=times), name="a.mkv")
    shown = [bar_position(image) // 4 for image in found]
    assert len(found) == pytest.approx(39, abs=2) and shown[20] == 4 and shown[10] == 2 and shown == sorted(shown)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    whole = remuxed(mp4(noise), movflags="faststart")
    assert error_of(tmp_path, b"").what == "the file is empty"
    assert "only audio" in error_of(tmp_path, audio_only()).what
    truncated = error_of(tmp_path, whole[: len(whole) // 2]).what
    assert "damaged or truncated" in truncated or "the video ends at" in truncated
    short = error_of(tmp_path, broken_stsz(media(pictures(60)))).what
    assert short == "the video ends at 0.00 s, its header says later"
    middle = bytearray(whole)
    middle[len(whole) // 2 : len(whole) // 2 + 4000] = b"\0" * 4000
    assert "damaged" in error_of(tmp_path, bytes(middle)).what


def test_how_ready_files_are_checked(tmp_path: Path) -> None:
    payload = mp4(pictures(40))
    path = tmp_path / "clip.mp4"
    path.write_bytes(payload)
    assert ready_payload(VideoFile(path), VideoOptions()) == (payload, probe(payload))
    assert transcode(VideoFile(path), VideoOptions()) == payload
    for media_file in (VideoFile(path, 0.1, 0.5), VideoFile(path, crop=Crop(0, 0, 0.5, 0.5))):
        assert ready_payload(media_file, VideoOptions()) is None
    for other in ({"short_side": 32}, {"fps": 50.0}, {"gop": 5}, {"keep_ready": False}):
        assert ready_payload(VideoFile(path), VideoOptions(**other)) is None  # type: ignore[arg-type]
    path.write_bytes(rotated(payload, 90))
    assert probe(transcode(VideoFile(path), VideoOptions())).width == 48, "a turned file is encoded upright"


def test_ready_files_that_are_damaged_are_not_stored(tmp_path: Path) -> None:
    payload = mp4(pictures(40))
    path = tmp_path / "clip.mp4"
    path.write_bytes(broken_stsz(payload))
    said = "damaged or truncated video: 1 frames decode of 1 stored, the header says 40"
    with pytest.raises(DataError, match=said):
        transcode(VideoFile(path), VideoOptions())
    segment = Segment("c", "clip", "train", "t", VideoFile(path))
    [skip] = prepare_videos([segment], VideoOptions())
    assert isinstance(skip, Skip) and skip.reason == "unreadable_media" and said in skip.detail
    middle = payload.index(b"mdat") + 645  # inside the first picture, behind the encoder's settings
    path.write_bytes(payload[:middle] + b"\xa5" * 60 + payload[middle + 60 :])
    with pytest.raises(DataError, match="damaged"):
        transcode(VideoFile(path), VideoOptions())
    path.write_bytes(payload[:middle] + bytes(16) + payload[middle + 16 :])
    with pytest.raises(DataError, match="damaged or truncated video: zeros in frame 0"):
        transcode(VideoFile(path), VideoOptions())


def test_damage_in_a_fragmented_file_is_found(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), dtype=np.uint8)
    payload = remuxed(mp4(noise), movflags="frag_keyframe+empty_moov+default_base_moof")
    path = tmp_path / "a.mp4"
    path.write_bytes(payload)
    assert transcode(VideoFile(path), VideoOptions()) == payload
    path.write_bytes(payload[: len(payload) // 2] + bytes(4000) + payload[len(payload) // 2 + 4000 :])
    [found] = prepare_videos([Segment("c", "a", "train", "t", VideoFile(path))], VideoOptions())
    assert isinstance(found, Skip) and found.reason == "unreadable_media"


def test_options_recorded_when_files_could_be_checked_by_their_headers() -> None:
    """A set of 0.1.0 says how its files were checked; it is the same set, and its form is read."""
    assert VideoOptions(fps=12.5).record() == {**asdict(VideoOptions(fps=12.5)), "validate": "full"}
    for how in ("full", "headers"):
        assert VideoOptions.from_record({"fps": 12.5, "validate": how}) == VideoOptions(fps=12.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'valid'"):
        VideoOptions.from_record({"valid": "full"})


# -- crops -----------------------------------------------------------------------------------------------------------
def test_crops_keep_the_part(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(media(patches(3)))
    crop = Crop(2 / 7, 0.25, 5 / 7, 0.75)
    result = transcode(VideoFile(path, crop=crop), VideoOptions())
    found = decode(result, 3)
    assert found.shape == (3, 40, 60, 3)
    columns = [found[1][20, round(60 * (n + 0.5) / 3)] for n in range(3)]
    assert np.abs(np.array(columns, int) - np.array(COLOURS[2:5])).max() <= 9
    assert transcode(VideoFile(path, crop=crop), VideoOptions()) == result
    small = transcode(VideoFile(path, 0.04, 0.08, crop), VideoOptions(short_side=20))
    assert decode(small, 1).shape == (1, 20, 30, 3)


def test_crop_of_a_turned_picture_is_a_part_of_the_upright_one(tmp_path: Path) -> None:
    lying = np.ascontiguousarray(np.rot90(patches(2), 1, axes=(1, 2)))
    path = tmp_path / "clip.mp4"
    path.write_bytes(rotated(media(lying), 90))
    found = decode(transcode(VideoFile(path, crop=Crop(0, 0.5, 2 / 7, 1)), VideoOptions()), 2)
    assert found.shape == (2, 40, 40, 3)
    assert np.abs(found[1][20, 10].astype(int) - COLOURS[0]).max() <= 9
    assert np.abs(found[1][20, 30].astype(int) - COLOURS[1]).max() <= 9


def test_square_crops() -> None:
    assert crop_box(Crop(0.25, 0.25, 0.75, 0.5, square=True), 200, 200, 1.0) == (50, 24, 100, 100)
    assert crop_box(Crop(0.0, 0.4, 0.2, 0.6, square=True), 400, 100, 1.0) == (0, 10, 80, 80)
    assert crop_box(Crop(0.0, 0.0, 0.1, 1.0, square=True), 400, 100, 1.0) == (0, 0, 70, 100), "the border ends it"
    assert crop_box(Crop(0.25, 0.0, 0.75, 1.0, square=True), 100, 100, 2.0) == (24, 0, 50, 100), "square on the screen"


@given(*[st.floats(0, 1) for _ in range(4)], st.integers(2, 300), st.integers(2, 300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_crops_are_even_and_inside(
    a: float, b: float, c: float, d: float, width: int, height: int, square: bool
) -> None:
    crop = Crop(min(a, b), min(c, d), max(a, b), max(c, d), square)
    if a == b or c == d:
        with pytest.raises(DataError, match="is no part of the picture\n  fix: give fractions"):
            crop_box(crop, width, height, 1.0)
        return
    x, y, wide, high = crop_box(crop, width, height, 1.0)
    assert x % 2 == y % 2 == 0 and wide >= 2 and high >= 2
    assert x >= 0 and x + wide <= width and y >= 0 and y + high <= height


# -- pieces of one file ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("g", "open_gop"), [(50, 0), (250, 0), (30, 1)])
def test_neighbouring_pieces_have_the_bytes_of_single_ones(tmp_path: Path, g: int, open_gop: int) -> None:
    path = tmp_path / "long.mp4"
    params = f"threads=1:open-gop={open_gop}:scenecut=0"
    path.write_bytes(media(pictures(300), g=g, bf=2, **{"x264-params": params}))
    spans = [(0.48, 1.52), (1.52, 3.0), (2.6, 4.0), (7.0, 8.0), (8.04, 8.4), (11.0, 12.5)]
    pieces = [VideoFile(path, start, end, Crop(0, 0, 1, 0.5) if start == 7 else None) for start, end in spans]
    together = transcode_pieces(pieces, VideoOptions())
    assert together == [transcode(piece, VideoOptions()) for piece in pieces]
    for (start, end), payload in zip(spans, together, strict=True):
        assert isinstance(payload, bytes)
        found = decode(payload, probe(payload).frames)
        first = round(start * 25)
        assert len(found) == min(300, round(end * 25)) - first
        assert abs(bar_position(found[0]) - bar_position(pictures(300)[first])) <= 1


def test_a_damaged_stretch_spoils_only_its_pieces(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (100, 48, 64, 3), dtype=np.uint8)
    payload = bytearray(mp4(noise, g=10))
    middle = payload.index(b"mdat") + (payload.index(b"moov") - payload.index(b"mdat")) // 2
    payload[middle : middle + 3000] = b"\xff" * 3000
    path = tmp_path / "long.mp4"
    path.write_bytes(payload)
    spans = [(0.0, 1.0), (1.0, 1.3), (1.9, 2.2), (3.0, 3.4), (3.6, 9.0), (3.0, 3.1)]
    pieces = [VideoFile(path, start, end) for start, end in spans[:5]]
    kinds = [type(result) for result in transcode_pieces(pieces, VideoOptions())]
    assert kinds == [bytes, bytes, DataError, bytes, OutsideVideo]
    segments = [Segment("c", str(n), "train", "t", piece) for n, piece in enumerate(pieces)]
    found = prepare_videos(segments, VideoOptions())
    assert [type(item) for item in found] == [PreparedVideo, PreparedVideo, Skip, PreparedVideo, Skip]
    assert isinstance(found[4], Skip) and "the video ends at" in found[4].detail
    gone = transcode_pieces([VideoFile(tmp_path / "gone.mp4", 0, 1)] * 2, VideoOptions())
    assert [str(item).splitlines()[0] for item in gone] == [f"{tmp_path}/gone.mp4: the file does not exist"] * 2


# -- folders of images -----------------------------------------------------------------------------------------------
def folder_of(path: Path, names: list[str]) -> FrameFolder:
    path.mkdir()
    for number, name in enumerate(names):
        Image.fromarray(pictures(len(names))[number]).save(path / name)
    return FrameFolder(path, "*", 25.0)


def test_gaps_in_the_numbers_are_missing_frames(tmp_path: Path) -> None:
    whole = [f"images{number:04d}.png" for number in range(1, 31)]
    gap = [name for number, name in enumerate(whole) if number not in (11, 12, 20)]
    with pytest.raises(MissingFrames, match=r"3 of 30 frames are missing: numbers 12, 13, 21\n  fix: unpack") as caught:
        frame_files(folder_of(tmp_path / "gap", gap))
    assert str(tmp_path) in caught.value.where
    segment = Segment("c", "a", "train", "t", FrameFolder(tmp_path / "gap", "*", 25.0))
    [skip] = prepare_videos([segment], VideoOptions())
    assert isinstance(skip, Skip) and skip.reason == "missing_frames"
    with pytest.raises(DataError, match="two images have the number 3"):
        frame_files(folder_of(tmp_path / "twice", ["a3.png", "a03.png", "a4.png"]))


def test_the_order_of_frames(tmp_path: Path) -> None:
    unpadded = [f"f-{number}.png" for number in range(8, 13)]
    assert [path.name for path in frame_files(folder_of(tmp_path / "a", unpadded))] == unpadded
    every_second = [f"x_fn{number:06d}-0.png" for number in range(0, 20, 2)]
    assert [path.name for path in frame_files(folder_of(tmp_path / "b", every_second))] == every_second
    words = ["first.png", "second.png", "third.png"]
    assert [path.name for path in frame_files(folder_of(tmp_path / "c", words))] == words
    assert len(frame_files(folder_of(tmp_path / "d", ["only7.png"]))) == 1
    found = decode(transcode(FrameFolder(tmp_path / "a", "*", 25.0), VideoOptions()), 5)
    assert [bar_position(image) // 4 for image in found] == list(range(5))


def test_every_pair_of_formats_is_deterministic(tmp_path: Path) -> None:
    for number, (pix_fmt, matrix) in enumerate(itertools.product(("yuv420p", "yuv420p10le"), ("ITU601", "ITU709"))):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(media(patches(4), pix_fmt=pix_fmt, matrix=matrix))
        assert len({transcode(VideoFile(path), AGAIN) for _ in range(4)}) == 1
