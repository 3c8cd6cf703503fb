"""Keypoints: layouts, what a missing joint is, normalisation by the shoulders, and files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError, OptionError
from shards.media.pose_files import read_points, with_confidence
from shards.media.pose_layouts import LAYOUTS
from shards.media.poses import PoseFiles, describe, normalise, resampled
from shards.schema import RowsFile

COCO = LAYOUTS["coco_wholebody"]


def person(frames: int = 6, layout: str = "coco_wholebody", seed: int = 0) -> np.ndarray:
    """Random keypoints in pixels, every one found."""
    known = LAYOUTS[layout]
    points = np.random.default_rng(seed).uniform(100, 300, (frames, known.points, 3))
    points[..., 2] = 0.9
    left, right = known.shoulders
    points[:, left, :2], points[:, right, :2] = (240, 200), (200, 200)
    return points


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_name_every_stored_joint_once(name: str) -> None:
    layout = LAYOUTS[name]
    assert len(set(layout.chosen)) == len(layout.chosen) and max(layout.chosen) < layout.points
    assert [len(names) for names in layout.joints.values()] == layout.sizes
    body = dict(zip(layout.joints["body"], layout.groups["body"], strict=True))
    assert (body["left_shoulder"], body["right_shoulder"]) == layout.shoulders
    assert list(layout.joints) == ["body", "left_hand", "right_hand", "face"]


def test_layouts_have_fingerprints_of_their_own() -> None:
    assert len({layout.fingerprint for layout in LAYOUTS.values()}) == len(LAYOUTS)
    assert describe(COCO) == "body 11, left_hand 21, right_hand 21, face 68"


def test_normalised_keypoints_do_not_depend_on_place_and_size() -> None:
    points = person()
    moved = points.copy()
    moved[..., :2] = moved[..., :2] * 2.5 + (40, -70)
    first, second = normalise(points, COCO, "a"), normalise(moved, COCO, "a")
    np.testing.assert_allclose(first, second, atol=1e-9)
    assert first.shape == (6, 121, 3)
    np.testing.assert_allclose(first[:, 5], [[0.5, 0, 0.9]] * 6)  # the left shoulder
    np.testing.assert_allclose(first[:, 6], [[-0.5, 0, 0.9]] * 6)


def test_the_signer_may_move_inside_a_clip() -> None:
    points = person(5)
    points[4, :, 0] += 40  # one shoulder width to the side
    joints = normalise(points, COCO, "a")
    np.testing.assert_allclose(joints[4, 5], [1.5, 0, 0.9])


def test_missing_joints_are_zero_with_their_confidence() -> None:
    points = person()
    points[2, 95, 2] = 0  # fourth joint of the left hand
    points[3, 0, 2] = 1.7
    joints = normalise(points, COCO, "a")
    assert joints[2, 11 + 4].tolist() == [0, 0, 0] and joints[3, 0, 2] == 1.0
    assert (joints[:, [0, 1, 2], 2] > 0).all()


def test_without_shoulders_nothing_can_be_normalised() -> None:
    points = person()
    points[:, 5, 2] = 0
    with pytest.raises(DataError, match="no frame shows both shoulders, so nothing says where the signer is"):
        normalise(points, COCO, "a")
    points = person()
    points[:, 5] = points[:, 6]
    with pytest.raises(DataError, match="both shoulders are at the same place"):
        normalise(points, COCO, "a")


def test_columns() -> None:
    values = np.asarray([[[1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [np.nan, 1.0, 0.2]]])
    assert with_confidence(values, "xyc").tolist() == [[[1, 2, 0.5], [0, 0, 0], [0, 0, 0]]]
    assert with_confidence(values, "xyz").tolist() == [[[1, 2, 1], [0, 0, 0], [0, 0, 0]]]
    assert with_confidence(values[..., [2, 0, 1]], "cxy").tolist() == [[[1, 2, 0.5], [0, 0, 0], [0, 0, 0]]]


def test_rows_of_a_file(tmp_path: Path) -> None:
    points = person(10)
    np.save(tmp_path / "a.npy", points)
    form = PoseFiles("coco_wholebody", 5.0)
    rows = form.read(RowsFile(tmp_path / "a.npy", 0.4, 1.0))
    assert rows.shape == (3, 363) and rows.dtype == np.float16
    expected = normalise(points[2:5], COCO, "a").reshape(3, -1)
    np.testing.assert_allclose(rows, expected, atol=4e-3)
    record = form.record()
    assert record["kind"] == "pose" and record["width"] == 363 and record["fingerprint"] == COCO.fingerprint
    assert record["joints"]["left_hand"][:3] == ["wrist", "thumb_1", "thumb_2"]
    assert PoseFiles.from_record(record) == form


def test_fractions_of_a_wide_picture_keep_their_shape(tmp_path: Path) -> None:
    points = person(4)
    np.save(tmp_path / "pixels.npy", points)
    np.save(tmp_path / "fractions.npy", points / (1600, 900, 1))
    pixels = PoseFiles("coco_wholebody", 25).read(RowsFile(tmp_path / "pixels.npy"))
    fractions = PoseFiles("coco_wholebody", 25, aspect=1600 / 900).read(RowsFile(tmp_path / "fractions.npy"))
    np.testing.assert_allclose(pixels, fractions, atol=4e-3)


def test_another_rate_takes_the_nearest_frames() -> None:
    rows = np.arange(50)
    assert resampled(rows, 25.0, 25.1) is rows
    assert resampled(rows, 50.0, 25.0).tolist() == list(range(1, 50, 2))
    assert resampled(rows[:3], 12.5, 25.0).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            person(2, "openpose"),
            r"(?s)holds 137 keypoints .*layout coco_wholebody has 133.*layout=openpose",
        ),
        (np.zeros((2, 50, 3)), r"(?s)holds 50 keypoints per frame.*name the estimator that wrote the file"),
        (np.zeros((2, 133, 4)), r"holds \[2, 133, 4\], expected \[frames, keypoints, 3\] for the columns xyc"),
        (np.zeros((0, 133, 3)), "holds no frame"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, values: Any, message: str) -> None:
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(DataError, match=message):
        PoseFiles("coco_wholebody", 25.0).read(RowsFile(tmp_path / "a.npy"))


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no keypoint file: the name ends in '\.mp4'.*\.npy"):
        read_points(tmp_path / "a.mp4", "xyc")


def test_unusable_options() -> None:
    with pytest.raises(OptionError, match=r"(?s)unknown layout 'blazepose'.*coco_wholebody"):
        PoseFiles("blazepose", 25)
    with pytest.raises(OptionError, match="columns 'xz' do not hold x and y once"):
        PoseFiles("openpose", 25, "xz")
    with pytest.raises(OptionError, match="rate 0 and aspect 1 must be positive"):
        PoseFiles("openpose", 0)
