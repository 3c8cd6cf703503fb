"""Augmentations: each against a slow reference, what strength 0 is, their limits, and one draw for all of a clip."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.augment_schema import AugmentConfig
from pipeline.inference import augment as augments
from pipeline.inference.augment import Augment
from pipeline.inference.clips import FetchFrames
from shards.build.build import BuildOptions, build
from shards.format.index import read_index
from shards.load.reader import Reader, wanted_frames
from shards.media.square import Placement
from shards.order.items import SHOWN_ELEMENT
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from tests.unit.shards.making import video_corpus

UNIT = st.floats(0, 1, exclude_max=True)
STRONG = AugmentConfig(
    crop_area=(0.4, 0.9), crop_aspect=(0.7, 1.4), scale=(0.8, 1.2), shift=0.2, flip=0.5, brightness=0.4, contrast=0.4,
    saturation=0.4, hue=0.2, grey=0.2, erase=0.5, speed=(0.5, 2.0), drop_frames=0.2, keep_part=(0.5, 1.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("augment")
    build(video_corpus(folder / "source", 4), folder / "videos", BuildOptions())
    return Plan([Source(read_index(folder / "videos"))], PlanOptions("clip", shuffle=False))


def chances(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(count)


# -- which frames --------------------------------------------------------------------------------------------------
@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 5), st.integers(0, 9))
def test_without_time_settings_the_frames_are_those_of_evaluation(stored: int, most: int, stride: int, at: int) -> None:
    numbers = Augment(AugmentConfig(flip=1.0), 0).frame_numbers(at, at, stored, most, stride)
    assert numbers == (wanted_frames(stored, most, stride) or list(range(stored)))


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 5), st.integers(0, 50), UNIT, UNIT, UNIT, UNIT)
def test_frames_are_in_order_inside_the_clip_and_fit_the_plan(
    stored: int, most: int, stride: int, at: int, slow: float, fast: float, drop: float, part: float
) -> None:
    config = AugmentConfig(
        speed=(0.25 + 0.75 * slow, 1 + 3 * fast), drop_frames=drop, keep_part=(0.1 + 0.9 * part, 1.0)
    )
    numbers = Augment(config, 7).frame_numbers(at, 0, stored, most, stride)
    assert numbers == sorted(numbers) and 0 <= numbers[0] <= numbers[-1] < stored
    assert all(number % stride == 0 for number in numbers)
    options = PlanOptions("clip", max_frames=most, frame_stride=stride, slowest=config.slowest)
    assert 1 <= len(numbers) <= int(options.lengths({"frames": np.array([stored]), "tokens": np.array([0])})[0])


def test_temporal_crop_keeps_its_part_from_anywhere() -> None:
    begins = {augments.temporal_crop(10, 0.5, place).start for place in np.linspace(0, 0.999, 60)}
    assert begins == set(range(6))
    assert all(len(augments.temporal_crop(10, 0.5, place)) == 5 for place in (0.0, 0.3, 0.999))
    assert augments.temporal_crop(7, 1.0, 0.999) == range(7)
    assert augments.temporal_crop(3, 0.1, 0.5) == range(1, 2), "a frame at least"


def test_speed_against_a_loop_over_moments() -> None:
    for count, speed in [(10, 2.0), (10, 0.5), (7, 1.3), (5, 0.7), (9, 1.0), (1, 4.0)]:
        shown = max(1, round(count / speed))
        moments = [(number + 0.5) * count / shown for number in range(shown)]
        assert augments.at_speed(range(count), speed, 99) == [int(moment + 1e-9) for moment in moments]
    assert augments.at_speed(range(4), 0.5, 99) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert augments.at_speed(range(3, 9), 2.0, 99) == [4, 6, 8]
    assert augments.at_speed(range(100), 0.5, 4) == [12, 37, 62, 87], "never more than there is room for"


def test_dropped_frames_are_a_share_of_all_and_one_stays() -> None:
    numbers = list(range(20_000))
    left = augments.drop_frames(numbers, 0.3, chances(20_001))
    assert abs(len(left) / 20_000 - 0.7) < 0.02 and left == sorted(left)
    assert augments.drop_frames(numbers, 0.0, chances(20_001)) == numbers
    assert augments.drop_frames([4, 5, 6], 0.99, np.array([0.5, 0.1, 0.1, 0.1])) == [5]


# -- which part of the frames --------------------------------------------------------------------------------------
@given(st.lists(UNIT, min_size=8, max_size=8))
def test_without_picture_settings_the_square_is_the_usual_one(numbers: list[float]) -> None:
    assert augments.placement(AugmentConfig(speed=(0.5, 2.0)), np.array(numbers)) == Placement()


@given(st.lists(UNIT, min_size=8, max_size=8), st.floats(0.05, 1), st.floats(0.5, 2))
def test_a_crop_is_a_part_of_the_usual_square(numbers: list[float], area: float, aspect: float) -> None:
    config = AugmentConfig(crop_area=(area, area), crop_aspect=(aspect, aspect))
    found = augments.placement(config, np.array(numbers))
    wide, high = 1 / found.zoom_x, 1 / found.zoom_y
    if wide < 1 and high < 1:
        assert wide * high == pytest.approx(area) and wide / high == pytest.approx(aspect)
    assert max(wide, high) <= 1 + 1e-12
    # the cut's borders, in sides of the usual square from its centre
    assert abs(found.right) * wide + wide / 2 <= 0.5 + 1e-9 and abs(found.down) * high + high / 2 <= 0.5 + 1e-9


@given(st.lists(UNIT, min_size=8, max_size=8))
def test_scale_shift_and_flip_keep_to_their_limits(numbers: list[float]) -> None:
    config = AugmentConfig(scale=(0.5, 1.5), shift=0.25, flip=0.5)
    found = augments.placement(config, np.array(numbers))
    assert found.zoom_x == found.zoom_y and 0.5 <= found.zoom_x < 1.5
    assert abs(found.right) <= 0.25 and abs(found.down) <= 0.25
    assert found.mirrored == (numbers[7] < 0.5)


# -- colours -------------------------------------------------------------------------------------------------------
def slow_colours(pixel: np.ndarray, bright: float, contrast: float, saturation: float, turns: float) -> np.ndarray:
    """One pixel, step by step, through YIQ."""
    value = pixel.astype(float) * bright
    value = (value - 127.5) * contrast + 127.5
    weights = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    y, i, q = weights @ value
    turned = complex(i, q) * saturation * np.exp(2j * np.pi * turns)
    return np.clip(np.linalg.solve(weights, [y, turned.real, turned.imag]), 0, 255)


@pytest.mark.parametrize("seed", range(6))
def test_colours_equal_a_slow_reference_through_yiq(seed: int) -> None:
    config = AugmentConfig(brightness=0.5, contrast=0.5, saturation=0.8, hue=0.3, grey=0.2)
    drawn = chances(5, seed)
    frames = np.random.default_rng(seed).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    expected = frames.copy()
    augments.recolour(frames, augments.colours(config, drawn))
    factors = [augments.about_one(most, number) for most, number in zip((0.5, 0.5, 0.8), drawn[:3], strict=True)]
    saturation = 0.0 if drawn[4] < 0.2 else factors[2]
    for place in np.ndindex(2, 4, 5):
        slow = slow_colours(expected[place], factors[0], factors[1], saturation, 0.3 * (2 * drawn[3] - 1))
        assert np.abs(frames[place] - slow).max() <= 0.51, place


def test_single_colour_steps() -> None:
    middle = np.full(5, 0.5)

    def of(settings: dict[str, Any], place: int, number: float, pixel: tuple[int, int, int]) -> list[int]:
        drawn = middle.copy()
        drawn[place] = number
        frames = np.array(pixel, np.uint8).reshape(1, 1, 1, 3).copy()
        augments.recolour(frames, augments.colours(AugmentConfig(**settings), drawn))
        return frames.ravel().tolist()

    assert of({"brightness": 0.5}, 0, 0.0, (100, 50, 200)) == [50, 25, 100]
    assert of({"brightness": 0.5}, 0, 0.9999, (100, 50, 200)) == [150, 75, 255], "cut off at 255"
    assert of({"contrast": 0.5}, 1, 0.0, (27, 127, 227)) == [77, 127, 177]
    assert of({"contrast": 1.0}, 1, 0.9999, (27, 128, 227)) == [0, 128, 255]
    lightness = round(0.299 * 100 + 0.587 * 50 + 0.114 * 200)
    assert of({"saturation": 1.0}, 2, 0.0, (100, 50, 200)) == [lightness] * 3
    assert of({"grey": 1.0}, 4, 0.5, (100, 50, 200)) == [lightness] * 3
    assert of({"hue": 0.5}, 3, 0.0, (90, 90, 90)) == [90, 90, 90], "grey has no hue"
    red = of({"hue": 0.5}, 3, 0.0, (128, 100, 100))
    assert red[0] < red[1] and red[0] < red[2], "half the circle away lies the opposite colour"


@given(st.lists(UNIT, min_size=5, max_size=5))
def test_strength_0_changes_no_colour(numbers: list[float]) -> None:
    affine = augments.colours(AugmentConfig(), np.array(numbers))
    assert (affine == np.eye(3, 4)).all()
    frames = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    augments.recolour(frames, affine)
    assert frames.ravel().tolist() == list(range(48))


# -- erasing -------------------------------------------------------------------------------------------------------
@given(st.lists(UNIT, min_size=6, max_size=6), st.floats(0.001, 0.9))
def test_an_erased_rectangle_lies_inside_and_is_of_one_colour(numbers: list[float], area: float) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (3, 24, 30, 3), dtype=np.uint8)
    before = frames.copy()
    augments.erase(frames, area, np.array(numbers))
    colour = (np.array(numbers[3:]) * 256).astype(np.uint8)
    painted = (frames == colour).all(axis=-1).all(axis=0)
    rows, columns = np.flatnonzero(painted.any(axis=1)), np.flatnonzero(painted.any(axis=0))
    assert painted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert (frames[:, ~painted] == before[:, ~painted]).all()
    root = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert root <= (24 * 30 * area) * 1.6 + 30 * 2, "as large as asked, up to whole pixels"


# -- clips ---------------------------------------------------------------------------------------------------------
def clip(plan: Plan, config: AugmentConfig | None, sample: int, showing: int, frames: int = 32) -> np.ndarray:
    fetch = FetchFrames(frames, 1, 32, None if config is None else Augment(config, 5))
    ((found, row),) = fetch(Reader(plan), np.array([(sample, 0, 10, showing)], SHOWN_ELEMENT))
    assert row.sample_id == plan.samples.row(sample).sample_id
    return found


def test_an_augmented_clip_is_what_its_steps_make_of_it(plan: Plan) -> None:
    for showing in range(4):
        augment = Augment(STRONG, 5)
        numbers = augment.frame_numbers(1, showing, 11, 32, 1)
        whole = Reader(plan).decoded(1, None, 32, augment.placement(1, showing))
        expected = augment.picture(whole, 1, showing)[numbers]
        found = clip(plan, STRONG, 1, showing)
        assert found.dtype == np.uint8 and found.shape == (len(numbers), 32, 32, 3)
        assert (found == expected).all()


def test_another_showing_or_sample_has_another_draw_and_the_same_one_the_same(plan: Plan) -> None:
    found = [clip(plan, STRONG, sample, showing) for sample in (0, 1) for showing in (0, 1)]
    assert len({clip.tobytes() for clip in found}) == 4
    assert (clip(plan, STRONG, 1, 1) == found[3]).all()


def test_switching_one_setting_on_changes_no_other(plan: Plan) -> None:
    one = AugmentConfig(crop_area=(0.4, 0.9), speed=(0.5, 2.0))
    both = AugmentConfig(crop_area=(0.4, 0.9), speed=(0.5, 2.0), flip=1.0, keep_part=(1.0, 1.0), erase_area=(0.1, 0.2))
    assert (clip(plan, both, 2, 0) == clip(plan, one, 2, 0)[:, :, ::-1]).all()


def test_settings_of_strength_0_leave_clips_as_they_are(plan: Plan) -> None:
    plain = Reader(plan).frames(0, max_frames=6, size=32)
    assert (clip(plan, AugmentConfig(), 0, 3, frames=6) == plain).all()
    assert (clip(plan, None, 0, 3, frames=6) == plain).all()


def test_a_fetch_draws_only_if_it_augments_and_can_be_pickled() -> None:
    assert not FetchFrames(8, 1, 32).draws
    fetch = FetchFrames(8, 1, 32, Augment(STRONG, 5))
    assert fetch.draws and pickle.loads(pickle.dumps(fetch)) == fetch


def test_what_a_recipe_s_settings_say_of_themselves() -> None:
    assert AugmentConfig().changed() == {} and AugmentConfig().slowest == 1.0
    config = AugmentConfig(speed=(0.8, 1.2), flip=0.5)
    assert config.changed() == {"speed": [0.8, 1.2], "flip": 0.5} and config.of_pictures() == {"flip": 0.5}
    assert AugmentConfig(erase_area=(0.1, 0.2)).changed() == {}, "nothing is erased"
    assert config.slowest == 0.8 and AugmentConfig(speed=(1.5, 2.0)).slowest == 1.0
    wrong = dict(AugmentConfig(speed=(2.0, 0.5), crop_area=(0.0, 1.0)).wrong_pairs())
    assert wrong == {
        "speed": "must be [lowest, highest] between 0.25 and 4, got [2.0, 0.5]",
        "crop_area": "must be [lowest, highest] between 0.05 and 1, got [0.0, 1.0]",
    }
