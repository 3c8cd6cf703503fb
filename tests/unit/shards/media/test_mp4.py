"""The mp4 reader agrees with libav on every kind of file, names damage, and is never sure of what it has not read."""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.build.prepare import PreparedVideo, Skip, prepare_at_once, prepare_videos
from shards.errors import DataError
from shards.media.mp4 import Mp4, NotSure, check_samples, read_mp4
from shards.media.video import VideoOptions, ready_payload, ready_structure, transcode
from shards.schema import Segment, VideoFile
from tests.unit.shards.making import audio_only, mp4, pictures
from tests.unit.shards.media_files import broken_stsz, media, patches, remuxed, rotated

HEADERS = VideoOptions(validate="headers")


def checked(payload: bytes, where: str = "clip.mp4") -> Mp4:
    track = read_mp4(lambda offset, size: payload[offset : offset + size], len(payload), where)
    check_samples(track, payload, where)
    return track


@functools.cache
def plain() -> bytes:
    return mp4(pictures(40))


def place_of(payload: bytes, kind: bytes) -> int:
    """First byte of the content of a box in ``moov``, or of ``ftyp``."""
    return payload.index(kind, 0 if kind == b"ftyp" else payload.rindex(b"moov")) + 4


def changed(payload: bytes, place: int, values: bytes) -> bytes:
    return payload[:place] + values + payload[place + len(values) :]


def without(payload: bytes, kind: bytes) -> bytes:
    """The box gets a name that says nothing."""
    return changed(payload, place_of(payload, kind) - 4, b"free")


def encoded(container: str = "mp4", mux: dict[str, str] | None = None, **options: Any) -> bytes:
    return media(pictures(30), container, mux=mux or {}, **({"g": 12, "bf": 0} | options))


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    # name -> file, and why it is not read ("" = it is)
    "plain": (plain, ""),
    "at the front": (lambda: remuxed(plain(), movflags="faststart"), ""),
    "every frame a key frame": (lambda: mp4(pictures(10), g=1), ""),
    "one frame": (lambda: mp4(pictures(1)), ""),
    "30000/1001": (lambda: mp4(pictures(30), fps=Fraction(30000, 1001)), ""),  # type: ignore[arg-type]
    "12.5": (lambda: mp4(pictures(30), fps=Fraction(25, 2)), ""),  # type: ignore[arg-type]
    "baseline": (lambda: encoded(profile="baseline"), ""),
    "slices": (lambda: encoded(**{"x264-params": "threads=1:slices=4"}), ""),
    "delimiters": (lambda: encoded(**{"x264-params": "threads=1:aud=1"}), ""),
    "tagged": (lambda: encoded(matrix="ITU709"), ""),
    "cropped by 8": (lambda: mp4(pictures(5, 72, 56)), ""),
    "two captions less": (lambda: encoded(mux={"use_editlist": "0"}), ""),
    "B-frames": (lambda: encoded(bf=2), "time offsets differ"),
    "audio": (lambda: mp4(pictures(30), audio=True), "not one trak box"),
    "only audio": (audio_only, "no video track"),
    "fragments": (lambda: remuxed(plain(), movflags="frag_keyframe+empty_moov"), "a fragmented file"),
    "QuickTime": (lambda: remuxed(plain(), "mov"), "a QuickTime file"),
    "Matroska": (lambda: remuxed(plain(), "matroska"), "a box|box"),
    "turned": (lambda: rotated(plain(), 90), "a turned or stretched picture"),
    "variable rate": (lambda: mp4(pictures(6), times=[0, 40, 80, 400, 440, 480]), "frame durations differ"),
    "full range": (lambda: mp4(pictures(5), pix_fmt="yuvj420p"), "full range"),
    "10 bit": (lambda: mp4(pictures(5), pix_fmt="yuv420p10le"), "not 8-bit 4:2:0"),
    "4:4:4": (lambda: mp4(pictures(5), pix_fmt="yuv444p"), "not 8-bit 4:2:0"),
    "odd size": (lambda: media(patches(2, 141, 81), pix_fmt="yuv444p"), "not 8-bit 4:2:0"),
    "wide pixels": (lambda: media(patches(2, 70, 80), aspect=2), "pixels that are not square"),
    "interlaced": (lambda: encoded(**{"x264-params": "threads=1:interlaced=1"}), "interlaced"),
    "HEVC": (lambda: encoded(codec="libx265", **{"x265-params": "log-level=0"}), "not one avc1 box"),
    "MPEG-4": (lambda: encoded(codec="mpeg4"), "not one avc1 box"),
    "open GOPs": (lambda: encoded(bf=2, **{"x264-params": "threads=1:open-gop=1"}), "time offsets differ"),
    "sets in the stream": (lambda: encoded(**{"x264-params": "threads=1:repeat-headers=1"}), "parameter sets|units"),
    "no bytes": (lambda: b"", "not one moov"),
    "text": (lambda: b"hello world, this is no video" * 20, "."),
}


@pytest.mark.parametrize("name", FILES)
def test_agrees_with_libav(name: str) -> None:
    make, reason = FILES[name]
    payload = make()
    if reason:
        with pytest.raises(NotSure, match=reason):
            checked(payload)
        return
    assert_agrees(checked(payload), payload)


def assert_agrees(track: Mp4, payload: bytes, flags: bool = True) -> None:
    """``flags``: libav's key frame flags too; they also depend on damage inside SEI units, which ours do not."""
    with av.open(io.BytesIO(payload), options={"err_detect": "explode"}, metadata_errors="replace") as container:
        [stream] = container.streams
        found = [packet for packet in container.demux(stream) if packet.pts is not None]
        times = sorted(packet.pts for packet in found)
        context = stream.codec_context
        # None: libav could decode no picture with these parameter sets, which is not looked at
        assert context.name == "h264" and context.pix_fmt in ("yuv420p", None)  # type: ignore[attr-defined]
        assert (context.width, context.height) == (track.width, track.height)  # type: ignore[attr-defined]
        assert (stream.sample_aspect_ratio or 1) == 1 and not stream.start_time  # type: ignore[attr-defined]
        assert stream.average_rate == track.fps and stream.frames in (0, track.frames)  # type: ignore[attr-defined]
        assert len(set(np.diff(times))) <= 1 and len(found) == track.frames
        if flags:
            assert [n for n, packet in enumerate(found) if packet.is_keyframe] == track.key_frames.tolist()
        assert [packet.pos for packet in found] == track.offsets.tolist()
        assert [packet.size for packet in found] == track.sizes.tolist()
    assert track.longest_gop == max(np.diff([*track.key_frames, track.frames]))


@pytest.mark.parametrize(
    ("box", "at", "values", "message"),
    [
        ("stsz", 4, struct.pack(">2I", 0, 7), r"damaged or truncated mp4: frame durations of 40 frames, sizes of 7"),
        ("stsz", 8, struct.pack(">I", 1 << 30), r"a table of 1073741824 rows in a box of 172 bytes"),
        ("stsz", 4, struct.pack(">2I", 9, 1 << 31), r"2147483648 frames of 9 bytes in a file of \d+"),
        ("stsz", 16, bytes(4), r"frame 1 has no bytes"),
        ("stsz", 12, struct.pack(">I", 1 << 20), r"lie outside the media data"),
        ("stss", 8, struct.pack(">2I", 1, 1), r"the list of key frames is not increasing or leaves the video"),
        ("stss", 12, struct.pack(">I", 99), r"the list of key frames is not increasing or leaves"),
        ("stsc", 8, struct.pack(">I", 2), r"the runs of chunks are not increasing or leave the list of chunks"),
        ("stsc", 12, struct.pack(">I", 39), r"chunks of 39 frames, sizes of 40"),
        ("stco", 8, struct.pack(">I", 7), r"samples at bytes 7\.\.\d+ lie outside the media data"),
        ("minf", -8, struct.pack(">I", 5000), r"the 'minf' box of 5000 bytes does not fit into its parent"),
        ("stbl", -8, bytes(4), r"the 'stbl' box of 0 bytes does not fit"),
        ("avcC", -8, struct.pack(">I", 7), r"the 'avcC' box of 7 bytes does not fit into its parent"),
    ],
)
def test_damaged_boxes(box: str, at: int, values: bytes, message: str) -> None:
    damaged = changed(plain(), place_of(plain(), box.encode()) + at, values)
    with pytest.raises(DataError, match=message + r".*(\n|$)") as caught:
        checked(damaged)
    assert caught.value.where == "clip.mp4" and "fetch the file again" in caught.value.fix


def test_damaged_samples() -> None:
    track = checked(plain())
    third = int(track.offsets[3])
    long = changed(plain(), third, struct.pack(">I", int(track.sizes[3]) + 9))
    with pytest.raises(DataError, match="the units of frame 3 do not add up to its size"):
        checked(long)
    with pytest.raises(DataError, match="the units of frame 3 do not add up"):
        checked(changed(plain(), third, bytes(4)))
    with pytest.raises(DataError, match="zeros in frame 0"):
        checked(changed(plain(), int(track.offsets[0]) + 40, bytes(16)))
    with pytest.raises(NotSure, match="pictures do not agree with the list of key frames"):
        checked(changed(plain(), third + 4, b"\x65"))
    with pytest.raises(NotSure, match="parameter sets or unknown units among the pictures"):
        checked(changed(plain(), third + 4, b"\x67"))
    with pytest.raises(DataError, match=r"damaged or truncated mp4: \d+ of \d+ bytes"):
        check_samples(track, plain()[: int(track.offsets[20])], "clip.mp4")
    front = remuxed(plain(), movflags="faststart")
    with pytest.raises(DataError, match=r"the mdat box ends at byte \d+, the file at \d+"):
        checked(front[:-100])
    with pytest.raises(NotSure, match="the movie header is not whole"):
        checked(plain()[:-100])


def test_overlaps_and_gaps() -> None:
    """Two chunks: the second one moved."""
    payload = two_chunks(plain())
    assert_agrees(checked(payload), payload)
    place = place_of(payload, b"stco") + 12
    [second] = struct.unpack_from(">I", payload, place)
    with pytest.raises(DataError, match="samples overlap"):
        checked(changed(payload, place, struct.pack(">I", second - 5)))
    with pytest.raises(NotSure, match="samples with gaps between them"):
        checked(changed(payload, place, struct.pack(">I", second + 5)))


def two_chunks(payload: bytes) -> bytes:
    """The same file whose table has a second chunk, for the frames from 15 on; boxes around it grow by 16 bytes."""
    track = checked(payload)
    runs = struct.pack(">5I", 0, 2, 1, 15, 1) + struct.pack(">3I", 2, len(track.sizes) - 15, 1)
    chunks = struct.pack(">4I", 0, 2, int(track.offsets[0]), int(track.offsets[15]))
    for kind, content, grown in ((b"stsc", runs, 12), (b"stco", chunks, 4)):
        place = place_of(payload, kind)
        payload = payload[:place] + content + payload[place + len(content) - grown :]
        for name in (kind, b"stbl", b"minf", b"mdia", b"trak", b"moov"):
            size_at = place_of(payload, name) - 8
            [size] = struct.unpack_from(">I", payload, size_at)
            payload = changed(payload, size_at, struct.pack(">I", size + grown))
    return payload


@pytest.mark.parametrize(
    "box", ["ftyp", "tkhd", "mdhd", "hdlr", "dinf", "stsd", "avcC", "stts", "stsz", "stsc", "stco"]
)
def test_missing_boxes_are_not_sure(box: str) -> None:
    with pytest.raises(NotSure, match=r"box|table of chunks"):
        checked(without(plain(), box.encode()))


# -- any bytes -------------------------------------------------------------------------------------------------------
PLACES = st.floats(0, 1, exclude_max=True)


@given(
    st.sampled_from(["plain", "at the front", "slices"]),
    st.lists(st.tuples(PLACES, st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=600, deadline=None)
def test_mutated_files(name: str, edits: list[tuple[float, bytes]], header: bool) -> None:
    """Only DataError and NotSure, and what is accepted has the structure that libav sees."""
    payload = mutable(name)
    low, high = 0, len(payload)
    if header:  # in the boxes, which are a small part of the file
        low = payload.rindex(b"moov")
        high = min(high, low + struct.unpack_from(">I", payload, low - 4)[0])
    for place, values in edits:
        payload = changed(payload, low + int(place * (high - low)), values)[: len(payload)]
    try:
        track = checked(payload)
    except (DataError, NotSure):
        return
    assert_agrees(track, payload, flags=False)


@functools.cache
def mutable(name: str) -> bytes:
    return FILES[name][0]()


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes(blob: bytes) -> None:
    with pytest.raises((NotSure, DataError)):
        checked(b"\0\0\0\x10ftypisom\0\0\0\0" + blob)


# -- in the build ----------------------------------------------------------------------------------------------------
def segment(path: Path) -> Segment:
    return Segment("c", path.stem, "train", "t", VideoFile(path))


def test_headers_keep_the_file_and_say_what_a_full_check_says(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(plain())
    found = ready_structure(VideoFile(path), HEADERS)
    full = ready_payload(VideoFile(path), VideoOptions())
    assert found == full and found is not None and found[0] == plain()
    [prepared] = prepare_at_once([segment(path)], HEADERS) or []
    assert prepared == PreparedVideo(*found)
    assert prepare_at_once([segment(path)], VideoOptions()) is None, "decoding is work for another process"
    assert prepare_at_once([segment(path)] * 2, HEADERS) is None
    for media_file in (VideoFile(path, 0.1, 0.5), VideoFile(tmp_path / "gone.mp4")):
        assert ready_structure(media_file, HEADERS) is None
    for other in ({"short_side": 32}, {"fps": 50.0}, {"gop": 5}, {"keep_ready": False}):
        assert ready_structure(VideoFile(path), VideoOptions(validate="headers", **other)) is None  # type: ignore[arg-type]


def test_damage_is_a_skip(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(broken_stsz(plain()))
    [skip] = prepare_at_once([segment(path)], HEADERS) or []
    assert isinstance(skip, Skip) and skip.reason == "unreadable_media" and "sizes of 1" in skip.detail
    assert prepare_videos([segment(path)], HEADERS) == prepare_videos([segment(path)], VideoOptions()) == [skip]


def test_files_of_another_structure_are_decoded_completely(tmp_path: Path) -> None:
    """Not accepted by their headers: a damaged picture in a fragmented file is found."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), dtype=np.uint8)
    payload = remuxed(mp4(noise), movflags="frag_keyframe+empty_moov+default_base_moof")
    path = tmp_path / "a.mp4"
    path.write_bytes(payload)
    assert prepare_at_once([segment(path)], HEADERS) is None
    assert transcode(VideoFile(path), HEADERS) == payload
    damaged = changed(payload, len(payload) // 2, bytes(4000))
    path.write_bytes(damaged)
    [found] = prepare_videos([segment(path)], HEADERS)
    assert isinstance(found, Skip) and found.reason == "unreadable_media"
