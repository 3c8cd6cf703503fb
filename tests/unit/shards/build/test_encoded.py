"""What a build says about media that it does not store as they are, and about segments that outlast their video."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import pytest
from av.bitstream import BitStreamFilterContext

from shards.build.build import BuildOptions, build
from shards.build.encoded import REASONS, encoded_lines
from shards.build.prepare import PreparedVideo, Skip, prepare_video, prepare_videos
from shards.build.report import corpus_report, report_lines
from shards.format.index import read_index
from shards.media.video import VideoOptions
from shards.schema import Segment, VideoFile
from tests.unit.shards.making import ListCorpus, mp4, pictures
from tests.unit.shards.media_files import remuxed


def clip(path: Path, payload: bytes, start: float | None = None, end: float | None = None) -> Segment:
    path.write_bytes(payload)
    return Segment("list", f"{path.stem}-{start}-{end}", "train", "ein Satz", VideoFile(path, start, end))


@pytest.mark.parametrize(
    ("made", "options", "why"),
    [
        ({"g": 250, "sc_threshold": 0}, {}, "key_frames"),
        ({"g": 250, "sc_threshold": 0}, {"gop": 250}, ""),
        ({"g": 250, "sc_threshold": 0}, {"keep_ready": False}, ""),
        ({"fps": 30}, {}, "rate"),
        ({}, {"short_side": 32}, "size"),
        ({"audio": True}, {}, "streams"),
        ({"pix_fmt": "yuv444p"}, {}, "codec"),
        ({"times": [0, 40, 80, *range(160, 1000, 40)]}, {"fps": 0}, "uneven_times"),
        ({}, {}, ""),
    ],
)
def test_why_a_whole_file_is_encoded(tmp_path: Path, made: dict[str, Any], options: dict[str, Any], why: str) -> None:
    payload = mp4(pictures(24), **made)
    found = prepare_video(clip(tmp_path / "a.mp4", payload), VideoOptions(**options))
    assert isinstance(found, PreparedVideo) and (found.why, found.source_bytes) == (why, len(payload) if why else 0)
    assert not why or why in REASONS


def with_aspect(payload: bytes, numerator: int, denominator: int) -> bytes:
    """The same pictures with the aspect of their pixels in the parameter set (first unit of every key frame)."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(payload)) as source, av.open(buffer, "w", format="mp4") as target:
        filters = {"h264_metadata": f"sample_aspect_ratio={numerator}/{denominator}"}
        given = source.streams.video[0]
        stream = target.add_stream_from_template(given)
        [(name, value)] = filters.items()
        edit = BitStreamFilterContext(f"{name}={value}", given, stream)
        for packet in source.demux(given):
            for edited in edit.filter(packet if packet.dts is not None else None):
                edited.stream = stream
                target.mux(edited)
    return buffer.getvalue()


@pytest.mark.parametrize(("aspect", "why"), [((1136, 1135), ""), ((64, 45), "pixels")])
def test_pixels_that_are_square_but_for_rounding(tmp_path: Path, aspect: tuple[int, int], why: str) -> None:
    payload = with_aspect(mp4(pictures(10)), *aspect)
    found = prepare_video(clip(tmp_path / "a.mp4", payload), VideoOptions())
    assert isinstance(found, PreparedVideo) and found.why == why and (found.payload == payload) == (not why)


def test_another_container_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(remuxed(mp4(pictures(24)), "matroska"))
    found = prepare_video(Segment("list", "a", "train", "x", VideoFile(path)), VideoOptions())
    assert isinstance(found, PreparedVideo) and found.why == "container"


def test_a_build_tells_what_encoding_ready_clips_costs(tmp_path: Path) -> None:
    far = [mp4(pictures(40, seed=number), g=250, sc_threshold=0) for number in range(3)]
    items = [clip(tmp_path / f"{number}.mp4", payload) for number, payload in enumerate(far)]
    items.append(clip(tmp_path / "ready.mp4", mp4(pictures(10))))
    corpus = ListCorpus(items)
    manifest = build(corpus, tmp_path / "set", BuildOptions(samples_per_shard=2))
    stored = sum(row.size for row in list(read_index(tmp_path / "set").rows())[:3])
    assert manifest.counts == {
        "samples": 4, "skipped": 0, "encoded/key_frames": 3,
        "encoded/key_frames/source_bytes": sum(map(len, far)), "encoded/key_frames/stored_bytes": stored,
    }  # fmt: skip
    lines = report_lines(corpus_report(corpus, tmp_path / "set"))
    (told,) = [line for line in lines if line.startswith("encoded:")]
    assert told == (
        f"encoded: 3 whole files, {sum(map(len, far)) / 1e6:.1f} -> {stored / 1e6:.1f} MB: "
        "key frames farther apart than gop; --store gop=250 keeps what x264 writes by default"
    )
    kept = build(corpus, tmp_path / "kept", BuildOptions(VideoOptions(gop=250)))
    assert kept.counts == {"samples": 4, "skipped": 0}
    assert encoded_lines(kept.counts) == []


@pytest.mark.parametrize("neighbours", [True, False])
def test_an_end_past_the_video_follows_one_rule(tmp_path: Path, neighbours: bool) -> None:
    """Half of the segment decides, whatever the seconds: 0.9 s past the end or 1.1 s."""
    payload = mp4(pictures(75))
    spans = [(1.0, 3.9), (1.0, 4.1), (1.5, 3.0), (1.5, 4.5), (1.5, 4.6), (2.9, 3.3), (3.0, 4.0), (5.0, 6.0)]
    segments = [clip(tmp_path / "a.mp4", payload, *span) for span in spans]
    options = VideoOptions()
    if neighbours:
        results = prepare_videos(segments, options)
    else:
        results = [prepare_video(segment, options) for segment in segments]
    found = [
        result.info.frames
        if isinstance(result, PreparedVideo)
        else f"{result.reason} {result.detail.partition(': ')[2]}"
        for result in results
    ]
    ends = "outside_video the video ends at"
    assert found == [
        50, 50, 37, 37, f"{ends} 2.96 s, the segment says later: of its 3.10 s only 1.50 s lie inside",
        f"{ends} 2.96 s, the segment says later: of its 0.40 s only 0.10 s lie inside",
        f"{ends} 3.00 s, the segment begins at 3.00 s", f"{ends} 3.00 s, the segment begins at 5.00 s",
    ]  # fmt: skip
    assert all(isinstance(result, Skip | PreparedVideo) for result in results)


def test_cut_segments_are_counted(tmp_path: Path) -> None:
    payload = mp4(pictures(75))
    items = [clip(tmp_path / "a.mp4", payload, *span) for span in [(1.0, 3.9), (1.5, 4.1), (0.5, 3.0), (2.0, 3.04)]]
    corpus = ListCorpus(items)
    manifest = build(corpus, tmp_path / "set", BuildOptions())
    assert manifest.counts == {"samples": 4, "skipped": 0, "cut_at_end": 2}
    assert "cut_at_end: 2 of the segments end after their video does" in report_lines(
        corpus_report(corpus, tmp_path / "set")
    )
