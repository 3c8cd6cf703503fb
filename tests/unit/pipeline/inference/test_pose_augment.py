"""What training changes in keypoints: exact geometry, missing joints stay missing, the same for the same showing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.augment_schema import AugmentConfig
from pipeline.config.schema import DataConfig, SourceConfig
from pipeline.errors import RecipeError
from pipeline.inference.augment import Augment
from pipeline.inference.clips import FetchFrames, FusedClip, holds_keypoints, pack_clips
from pipeline.inference.pose_augment import CHANCES, move_joints
from pipeline.models.clip_layout import ClipSizes
from pipeline.models.streams import Streams
from pipeline.stages.data import pose_plan
from shards.build.build import BuildOptions, build
from shards.format.index import read_index
from shards.load.beside import Beside
from shards.load.reader import Reader
from shards.media.poses import PoseFiles
from shards.media.rows import FeatureFiles
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.schema import RowsFile, Segment
from tests.unit.shards.making import ListCorpus


def joints(frames: int = 4, count: int = 5) -> np.ndarray:
    rows = np.random.default_rng(0).uniform(-2, 2, (frames, count, 3))
    rows[..., 2] = 0.9
    rows[1, 2] = 0.0
    return rows.astype(np.float16).reshape(frames, -1)


def test_nothing_changes_by_default() -> None:
    rows = joints()
    moved = move_joints(rows, AugmentConfig(), np.full(CHANCES + 5, 0.3))
    assert (moved == rows).all() and moved is not rows


def test_scale_turn_and_shift_are_about_the_shoulders() -> None:
    rows = joints()
    config = AugmentConfig(pose_scale=(0.5, 1.5), pose_turn=30, pose_shift=0.4)
    chances = np.asarray([1.0, 1.0, 1.0, 0.0, *[0.5] * 5])
    moved = move_joints(rows, config, chances).astype(np.float64).reshape(4, 5, 3)
    before = rows.astype(np.float64).reshape(4, 5, 3)
    cos, sin = 1.5 * math.cos(math.pi / 6), 1.5 * math.sin(math.pi / 6)
    turned = before[..., :2] @ np.asarray([[cos, sin], [-sin, cos]]) + (0.4, -0.4)
    there = before[..., 2] > 0
    np.testing.assert_allclose(moved[there][:, :2], turned[there], atol=4e-3)
    assert (moved[1, 2] == 0).all() and (moved[there][:, 2] == before[there][:, 2]).all()


def test_dropped_joints_are_missing_throughout() -> None:
    chances = np.asarray([0.5, 0.5, 0.5, 0.5, 0.1, 0.9, 0.9, 0.2, 0.9])
    moved = move_joints(joints(), AugmentConfig(pose_drop=0.3), chances).reshape(4, 5, 3)
    assert (moved[:, [0, 3]] == 0).all() and (moved[:, [1, 4], 2] > 0).all()


def plan_of(folder: Path, form: FeatureFiles | PoseFiles, width: int) -> Plan:
    items = []
    for number in range(2):
        points = np.random.default_rng(number).uniform(0.1, 1, (8, 30, 3) if width == 90 else (8, width))
        path = folder / f"{width}-{number}.npy"
        np.save(path, points)
        items.append(Segment("list", f"c{number}", "train", f"satz {number}", RowsFile(path)))
    build(ListCorpus(items), folder / f"set-{width}", BuildOptions(rows=form), 1)
    return Plan([Source(read_index(folder / f"set-{width}"))], PlanOptions("clip", shuffle=False))


def test_keypoints_alone_and_beside_frames_follow_the_showing(tmp_path: Path) -> None:
    poses = plan_of(tmp_path, PoseFiles("synthetic", 25.0), 90)
    clips = plan_of(tmp_path, FeatureFiles("toy", "toy", 4, 25.0), 4)
    assert holds_keypoints(poses) and not holds_keypoints(clips)
    augment = Augment(AugmentConfig(pose_turn=20, pose_drop=0.2, drop_frames=0.4), seed=3)
    reader, beside = Reader(clips), Beside(poses)
    item = np.zeros(2, dtype=[("sample", np.int64), ("showing", np.int64)])
    item["sample"] = [0, 1]
    fetch = FetchFrames(6, 1, 0, augment, beside=beside)
    alone = FetchFrames(6, 1, 0, augment)
    for showing in (0, 5):
        item["showing"] = showing
        fused = fetch(reader, item)
        again = fetch(reader, item)
        keypoints = alone(Reader(poses), item)
        for (clip, row), (same, _), (rows_TK, _) in zip(fused, again, keypoints, strict=True):
            assert isinstance(clip, FusedClip) and isinstance(same, FusedClip) and isinstance(rows_TK, np.ndarray)
            assert (clip.pose_TK == same.pose_TK).all() and (clip.pose_TK == rows_TK).all()
            assert len(clip.frames) == len(clip.pose_TK) and row.sample_id in ("c0", "c1")
    plain, _ = FetchFrames(6, 2, 0, beside=beside)(reader, item)[0]
    assert isinstance(plain, FusedClip) and plain.pose_TK.shape == (4, 90)
    batch = pack_clips([FetchFrames(6, 2, 0, beside=beside)(reader, item)], ClipSizes(4, 2, 8))
    assert isinstance(batch["frames_NHWC"], Streams) and batch["frames_NHWC"].pose_NK.shape == (8, 90)


def test_all_sources_name_keypoints_or_none() -> None:
    named, without = SourceConfig(shards="a", pose="p"), SourceConfig(shards="b")
    data = DataConfig(train=[named, without])
    assert pose_plan(data, [without]) is None
    with pytest.raises(RecipeError, match="the source b names no pose, others do"):
        pose_plan(data, data.train)
