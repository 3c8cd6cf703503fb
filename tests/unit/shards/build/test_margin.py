"""Margins around clips: the clip stays what it is for everyone, and its surroundings can be read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shards.build.build import BuildOptions, build
from shards.build.features import FeatureOptions, write_features
from shards.errors import DataError, OptionError
from shards.exchange.adopt import adopt
from shards.format.index import MANIFEST_NAME, read_index
from shards.inspect.lint import LintOptions, lint
from shards.load.reader import Reader
from shards.media.video import VideoOptions, decode, transcode
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.schema import Manifest, Segment, VideoFile
from tests.unit.films import FPS, SIZE, write_film

FORM = VideoOptions(short_side=SIZE, fps=FPS, crf=10)
MARGIN, FRAMES = 0.8, 10


class Broadcast:
    """Pieces of one film: at its very beginning, inside, overlapping with the one before, and over its end."""

    name = "broadcast"

    def __init__(self, film: Path, end: float) -> None:
        self.film, self.times = film, [(0.0, 1.6), (2.0, 4.0), (3.6, 5.2), (end - 1.2, end + 0.4)]

    def segments(self) -> Iterator[Segment]:
        for number, (start, end) in enumerate(self.times):
            yield Segment("broadcast", f"clip{number}", "train", f"text {number}", VideoFile(self.film, start, end))


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A film and all of its frames."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(path, 2)
    payload = transcode(VideoFile(path, 0.0), FORM)
    from shards.media.video import probe

    return path, decode(payload, probe(payload).frames)


@pytest.fixture(scope="module")
def corpus(film: tuple[Path, np.ndarray]) -> Broadcast:
    return Broadcast(film[0], len(film[1]) / FPS)


@pytest.fixture(scope="module")
def sets(corpus: Broadcast, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same clips without and with margins."""
    folder = tmp_path_factory.mktemp("sets")
    build(corpus, folder / "plain", BuildOptions(video=FORM))
    build(corpus, folder / "wide", BuildOptions(video=FORM, margin_seconds=MARGIN))
    return folder / "plain", folder / "wide"


def reader_of(folder: Path) -> Reader:
    return Reader(Plan([Source(read_index(folder))], PlanOptions("clip", shuffle=False)))


def same_pictures(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal but for what encoding twice changes."""
    return ours.shape == theirs.shape and float(np.abs(ours.astype(int) - theirs).mean()) < 4


def test_the_index_is_that_of_the_clips(sets: tuple[Path, Path]) -> None:
    plain, wide = (read_index(folder).table for folder in sets)
    for name in ("sample_id", "text", "frames", "fps", "duration_seconds", "width", "height"):
        assert plain[name].to_pylist() == wide[name].to_pylist(), name
    assert plain["frames"].to_pylist() == [20, 25, 20, 15]  # the last one is cut off by the end of the film


def test_frames_are_those_of_the_clips(sets: tuple[Path, Path]) -> None:
    plain, wide = map(reader_of, sets)
    for sample in range(4):
        assert wide.margin_frames(sample) == FRAMES and plain.margin_frames(sample) == 0
        assert same_pictures(wide.frames(sample), plain.frames(sample))
        assert same_pictures(wide.frames(sample, 7, 2, 32), plain.frames(sample, 7, 2, 32))


def test_numbers_beyond_the_clip_are_its_surroundings(
    sets: tuple[Path, Path], film: tuple[Path, np.ndarray], corpus: Broadcast
) -> None:
    wide, frames = reader_of(sets[1]), film[1]
    for sample, (start, _) in enumerate(corpus.times):
        clip = wide.stored_frames(sample)
        numbers = list(range(-FRAMES, clip + FRAMES))
        expected = [min(max(0, round(start * FPS) + number), len(frames) - 1) for number in numbers]
        assert same_pictures(wide.decoded(sample, numbers), frames[expected])
        with pytest.raises(DataError, match="not increasing"):
            wide.decoded(sample, [clip + FRAMES])


def test_manifest_and_json_say_so(sets: tuple[Path, Path]) -> None:
    plain, wide = map(reader_of, sets)
    assert wide.meta(1)["margin_frames"] == FRAMES and "margin_frames" not in plain.meta(1)
    assert read_index(sets[1]).manifest.margin_seconds == MARGIN and read_index(sets[0]).manifest.margin_seconds == 0
    assert "margin_seconds" not in read_index(sets[0]).manifest.options
    assert Manifest("features", options={"margin_seconds": 1.0}).margin_seconds == 0


def test_lint_features_and_adoption_know_margins(sets: tuple[Path, Path], tmp_path: Path) -> None:
    report = lint(sets[1], LintOptions())
    assert report.ok and report.frames == 80

    class Mean:
        identity = {"fingerprint": "mean", "width": 3}  # noqa: RUF012
        image_pixels = 32

        def __call__(self, frames_THWC: np.ndarray) -> np.ndarray:
            return frames_THWC.mean((1, 2))

    write_features(sets[1], tmp_path / "features", Mean(), FeatureOptions())
    write_features(sets[0], tmp_path / "plain", Mean(), FeatureOptions())
    wide, plain = (read_index(tmp_path / name).table["frames"].to_pylist() for name in ("features", "plain"))
    assert wide == plain == [20, 25, 20, 15]
    import shutil

    copy = shutil.copytree(sets[1], tmp_path / "copy")
    (copy / "index.parquet").unlink()
    adopt(copy)
    assert read_index(copy).fingerprint == read_index(sets[1]).fingerprint
    (copy / MANIFEST_NAME).unlink()
    adopt(copy)
    with pytest.raises(DataError, match="40 frames, the index says 20"):
        reader_of(copy).frames(0)


def test_the_bytes_do_not_depend_on_the_neighbours(corpus: Broadcast, sets: tuple[Path, Path], tmp_path: Path) -> None:
    class One:
        name = "broadcast"

        def segments(self) -> Iterator[Segment]:
            yield list(corpus.segments())[2]

    build(One(), tmp_path / "one", BuildOptions(video=FORM, margin_seconds=MARGIN))
    assert bytes(reader_of(tmp_path / "one").payload(0)) == bytes(reader_of(sets[1]).payload(2))


def test_a_clip_that_lies_behind_the_end_is_skipped(corpus: Broadcast, tmp_path: Path) -> None:
    late = Broadcast(corpus.film, 0.0)
    end = corpus.times[3][1] - 0.4
    late.times = [(0.0, 1.6), (end - 0.4, end + 1.2)]
    options = BuildOptions(video=FORM, margin_seconds=MARGIN, max_skipped_fraction=0.5)
    manifest = build(late, tmp_path / "late", options)
    assert manifest.counts["skipped/outside_video"] == 1
    skipped = [json.loads(line) for line in (tmp_path / "late" / "skipped.jsonl").read_text().splitlines()]
    assert "of its 3.20 s only 1.20 s lie inside" in skipped[0]["detail"]


def test_whole_files_have_no_margins(corpus: Broadcast, tmp_path: Path) -> None:
    class Whole:
        name = "whole"

        def segments(self) -> Iterator[Segment]:
            yield Segment("whole", "a", "train", "text", VideoFile(corpus.film))

    with pytest.raises(OptionError, match="a is a whole file or a folder of frames: it has nothing around it"):
        build(Whole(), tmp_path / "whole", BuildOptions(video=FORM, margin_seconds=MARGIN))
    with pytest.raises(OptionError, match="margin_seconds -1 is not between 0 and 30"):
        dataclasses.replace(BuildOptions(), margin_seconds=-1.0)
