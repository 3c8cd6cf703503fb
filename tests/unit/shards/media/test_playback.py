"""A video that plays once gives the pictures that cutting it gives."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.media.playback import play
from shards.media.video import VideoOptions, encode_pictures, transcode
from shards.schema import Crop, VideoFile
from tests.unit.films import FPS, write_film

FORM = VideoOptions(short_side=48, fps=FPS)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(path, 2)
    return path


@pytest.mark.parametrize("fps", [FPS, 25.0])
def test_a_clip_of_the_played_pictures_has_the_bytes_of_the_cut(film: Path, fps: float) -> None:
    form = VideoOptions(short_side=48, fps=fps)
    with play(film, form) as playback:
        start, stop = 20, 45
        clip = list(itertools.islice(playback.pictures, start, stop))
        begin, end = playback.seconds(start), playback.seconds(stop) - 1 / (8 * fps)  # no frame begins at the end
    assert encode_pictures(clip, fps, form, "clip") == transcode(VideoFile(film, begin, end), form)


def test_a_stream_that_cannot_seek_gives_the_same_pictures(film: Path) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: object) -> int:
            raise OSError("a pipe")

    payload = transcode(VideoFile(film), FORM)
    with play(film, FORM) as playback:
        expected = encode_pictures(playback.pictures, FPS, FORM, "film")
    assert expected == transcode(VideoFile(film, 0.0), FORM)
    import av

    pipe = io.BytesIO()
    with av.open(io.BytesIO(payload)) as source, av.open(pipe, "w", format="matroska") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with play(Pipe(pipe.getvalue()), FORM) as playback:
        assert playback.where == "standard input"
        streamed = [bytes(picture.planes[0]) for picture in playback.pictures]
    file = film.with_name("same.mkv")
    file.write_bytes(pipe.getvalue())
    with play(file, FORM) as playback:
        assert streamed == [bytes(picture.planes[0]) for picture in playback.pictures]
    assert len(streamed) > 50


def test_a_part_of_the_picture(film: Path) -> None:
    crop = Crop(0.25, 0.0, 0.75, 0.5)
    with play(film, FORM, crop) as playback:
        first = next(playback.pictures)
    assert (first.width, first.height) == (32, 32)


def test_no_video(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the file does not exist"), play(tmp_path / "absent.mp4", FORM):
        pass
    with pytest.raises(DataError, match="not a readable video") as caught, play(io.BytesIO(b"no video"), FORM):
        pass
    assert caught.value.where == "standard input"
