"""Media that opens and then disappoints: what libav reports, or leaves out, becomes an error that names the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest

from shards.errors import DataError
from shards.media import video
from shards.media.source import DecodingPass, packets, stream_rate
from shards.media.video import VideoOptions, decode, ready_payload
from shards.schema import VideoFile
from tests.unit.shards.making import mp4, pictures


def test_a_container_that_breaks_off() -> None:
    class Breaking:
        def demux(self, stream: Any) -> Iterator[Any]:
            yield stream
            raise av.error.InvalidDataError(1094995529, "Invalid data found")

    found = packets(Breaking(), "packet", "a.mkv")
    assert next(found) == "packet"
    with pytest.raises(DataError, match=r"a\.mkv: damaged or truncated video \(Invalid data found\)"):
        next(found)


def test_a_stream_without_a_rate() -> None:
    with pytest.raises(DataError, match=r"a\.gif: no frame rate: a still image or an empty stream"):
        stream_rate(SimpleNamespace(average_rate=None, guessed_rate=None), "a.gif")


def test_a_stream_without_a_frame() -> None:
    nothing_came: Any = SimpleNamespace(position=-math.inf, where="a.mp4")
    with pytest.raises(DataError, match=r"a\.mp4: no frame can be decoded"):
        DecodingPass._check_end(nothing_came, VideoFile(Path("a.mp4")))


def test_fewer_frames_than_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_collect", lambda *parts: ([], 5))
    with pytest.raises(DataError, match=r"set:a: 5 frames, the index says 10\n  fix: rebuild this shard set"):
        decode(mp4(pictures(10)), 10, [4], where="set:a")


def test_fewer_frames_than_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(mp4(pictures(10)))
    found = video.decoded_packets
    monkeypatch.setattr(video, "decoded_packets", lambda *parts: list(found(*parts))[:-1])
    with pytest.raises(DataError, match=r"a\.mp4: damaged or truncated video: 9 frames decode of 10 stored"):
        ready_payload(VideoFile(path), VideoOptions())
