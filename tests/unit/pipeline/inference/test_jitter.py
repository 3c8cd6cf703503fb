"""Offset jitter: the whole cut moves, by numbers that the showing decides, inside the stored margins."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.augment_schema import AugmentConfig
from pipeline.config.weak_schema import JitterConfig
from pipeline.errors import RecipeError
from pipeline.inference.augment import Augment
from pipeline.inference.clips import FetchFrames
from pipeline.inference.jitter import Jitter, check_margins
from shards.build.build import BuildOptions, build
from shards.format.index import read_index
from shards.load.loader import LoaderOptions, StepLoader
from shards.load.reader import Reader
from shards.media.video import VideoOptions
from shards.order.items import SHOWN_ELEMENT
from shards.order.options import PlanOptions, Source
from shards.order.plan import Cursor, Plan
from shards.schema import Segment, VideoFile
from tests.unit.films import FPS, SIZE, write_film

FORM = VideoOptions(short_side=SIZE, fps=FPS)
CONFIG = JitterConfig(before_seconds=0.4, after_seconds=0.8)
BEFORE, AFTER = 5, 10


class Pieces:
    name = "pieces"

    def __init__(self, film: Path) -> None:
        self.film = film

    def segments(self) -> Iterator[Segment]:
        for number in range(4):
            media = VideoFile(self.film, 1.0 + number, 2.2 + number)
            yield Segment(("aligned", "weak")[number % 2], f"clip{number}", "train", f"text {number}", media)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Plan]:
    """Plans of the same clips without and with margins."""
    folder = tmp_path_factory.mktemp("jitter")
    write_film(folder / "film.mp4", 2)
    build(Pieces(folder / "film.mp4"), folder / "plain", BuildOptions(video=FORM))
    build(Pieces(folder / "film.mp4"), folder / "wide", BuildOptions(video=FORM, margin_seconds=0.8))
    options = PlanOptions("clip", shuffle=False, seed=3)
    plain, wide = (Plan([Source(read_index(folder / name))], options) for name in ("plain", "wide"))
    return plain, wide


def test_every_offset_has_an_equal_chance(plans: tuple[Plan, Plan]) -> None:
    reader, jitter = Reader(plans[1]), Jitter(CONFIG, 3)
    drawn = collections.Counter(jitter.offset(reader, 0, showing) for showing in range(4000))
    assert set(drawn) == set(range(-BEFORE, AFTER + 1))
    assert all(150 < count < 350 for count in drawn.values())
    seldom = Jitter(CONFIG.model_copy(update={"probability": 0.25}), 3)
    still = sum(seldom.offset(reader, 0, showing) == 0 for showing in range(2000)) / 2000
    assert abs(still - (0.75 + 0.25 / 16)) < 0.04


def test_the_cut_moves_and_keeps_its_length(plans: tuple[Plan, Plan]) -> None:
    reader, jitter = Reader(plans[1]), Jitter(CONFIG, 3)
    fetch = FetchFrames(12, 1, 32, jitter=jitter)
    assert fetch.draws
    for showing in range(6):
        item = np.array([(1, 0, 15, showing)], dtype=SHOWN_ELEMENT)
        ((frames_THWC, row),) = fetch(reader, item)
        offset = jitter.offset(reader, 1, showing)
        plain = FetchFrames(12, 1, 32)(reader, item)[0][0]
        assert len(frames_THWC) == len(plain) == 12 and row.sample_id == "clip1"
        numbers = [number + offset for number in (0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14)]
        expected = reader.decoded(1, numbers, 32)
        assert np.array_equal(frames_THWC, expected) or np.array_equal(frames_THWC, plain) == (offset == 0)
        assert (offset == 0) == np.array_equal(frames_THWC, plain)


def test_with_augmentation_both_choose_frames(plans: tuple[Plan, Plan]) -> None:
    reader, jitter = Reader(plans[1]), Jitter(CONFIG, 3)
    augment = Augment(AugmentConfig(speed=(0.8, 1.3)), 3)
    item = np.array([(2, 0, 15, 5)], dtype=SHOWN_ELEMENT)
    ((frames_THWC, _),) = FetchFrames(12, 1, 32, augment, jitter=jitter)(reader, item)
    numbers = [n + jitter.offset(reader, 2, 5) for n in augment.frame_numbers(2, 5, reader.stored_frames(2), 12, 1)]
    assert np.array_equal(frames_THWC, augment.frames(reader, 2, 5, numbers, 32))


def test_clips_of_other_corpora_stay(plans: tuple[Plan, Plan]) -> None:
    reader, jitter = Reader(plans[1]), Jitter(CONFIG.model_copy(update={"corpora": ["weak"]}), 3)
    offsets = [[jitter.offset(reader, sample, showing) for showing in range(20)] for sample in range(4)]
    assert not any(offsets[0] + offsets[2]) and any(offsets[1]) and any(offsets[3])


def test_the_same_clips_for_any_workers_and_after_a_resume(plans: tuple[Plan, Plan]) -> None:
    plan, fetch = plans[1], FetchFrames(12, 1, 32, jitter=Jitter(CONFIG, 3))

    def batches(workers: int, begin: int = 0) -> list[bytes]:
        loader = StepLoader(plan, fetch, _joined, LoaderOptions(0, 1, 2, 2, workers))
        if begin:
            loader.load_state_dict(plan.state(plan.advance(Cursor(), 2 * begin)))
        return [step.micro_batches[0]["clips"] for step in islice(loader, 6 - begin)]

    whole = batches(0)
    assert whole == batches(1) and whole[3:] == batches(0, begin=3)
    assert len(set(whole)) == 6  # three epochs of the same four clips, cut otherwise each time


def _joined(raws: list[list[tuple[np.ndarray, object]]]) -> dict[str, bytes]:
    return {"clips": b"".join(frames_THWC.tobytes() for raw in raws for frames_THWC, _ in raw)}


def test_sets_without_margins_are_refused(plans: tuple[Plan, Plan]) -> None:
    plain, wide = plans
    check_margins(wide, CONFIG)
    check_margins(plain, JitterConfig(), fused=True)
    with pytest.raises(RecipeError, match="reads keypoints beside them, which are stored"):
        check_margins(wide, CONFIG, fused=True)
    message = r"data\.jitter moves cuts by up to 0\.8 s, but \S+plain keeps nothing around the clips of aligned, weak"
    with pytest.raises(RecipeError, match=rf"{message}.*--store margin_seconds=0\.8"):
        check_margins(plain, CONFIG)
    with pytest.raises(RecipeError, match=r"up to 2 s, but \S+wide keeps 0\.8 s around the clips of weak\."):
        check_margins(wide, JitterConfig(before_seconds=2.0, corpora=["weak"]))
    with pytest.raises(RecipeError, match=r"data\.jitter\.corpora: news is in no source .*there are aligned, weak"):
        check_margins(wide, JitterConfig(before_seconds=0.5, corpora=["news"]))
