"""Keypoints of the same samples in a second shard set: found by id, of the same number of frames."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.build.build import BuildOptions, build
from shards.errors import DataError
from shards.format.index import read_index
from shards.load.beside import Beside, fitted
from shards.media.rows import FeatureFiles
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.schema import RowsFile, Segment
from tests.unit.shards.making import ListCorpus


def make(folder: Path, name: str, lengths: dict[str, int]) -> Plan:
    """A set of rows [length, 2] that hold their own number, in the order of the names."""
    items = []
    for key, length in lengths.items():
        np.save(folder / f"{name}-{key}.npy", np.repeat(np.arange(length, dtype=np.float32)[:, None], 2, 1))
        items.append(Segment("list", key, "train", f"satz {key}", RowsFile(folder / f"{name}-{key}.npy")))
    build(ListCorpus(items), folder / name, BuildOptions(rows=FeatureFiles("toy", name, 2, 25.0)), 1)
    return Plan([Source(read_index(folder / name))], PlanOptions("clip", shuffle=False))


def test_rows_are_found_by_id_in_any_order(tmp_path: Path) -> None:
    clips = make(tmp_path, "clips", {"a": 5, "b": 7, "c": 4})
    poses = make(tmp_path, "poses", {"x": 9, "c": 4, "a": 5, "b": 7})
    beside = pickle.loads(pickle.dumps(Beside(poses)))
    beside.check(clips)
    assert [len(beside.rows(clips.samples.row(sample))) for sample in range(3)] == [5, 7, 4]


def test_one_frame_more_or_less_is_rounding() -> None:
    rows = np.arange(6, dtype=np.float16)[:, None]
    assert fitted(rows, 6, "a") is rows
    assert fitted(rows, 5, "a")[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert fitted(rows, 7, "a")[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 5]
    with pytest.raises(DataError, match="a: has 6 frames of keypoints beside its 4 frames"):
        fitted(rows, 4, "a")


def test_samples_without_fitting_keypoints_are_named(tmp_path: Path) -> None:
    clips = make(tmp_path, "clips", {"a": 5, "b": 7, "c": 4, "d": 3})
    beside = Beside(make(tmp_path, "poses", {"a": 5, "b": 9, "d": 3}))
    with pytest.raises(DataError, match=r"b \(list/b\): has 9 frames of keypoints for its 7 frames.*; so have 1 more"):
        beside.check(clips)
    (tmp_path / "other").mkdir()
    beside = Beside(make(tmp_path / "other", "poses", {"a": 5}))
    with pytest.raises(DataError, match=r"list/b\): has no keypoints in .*poses; so have 2 more samples"):
        beside.check(clips)
    with pytest.raises(DataError, match="list/c: has no keypoints beside it"):
        beside.rows(clips.samples.row(2))
    with pytest.raises(DataError, match="list/a: has 5 frames of keypoints beside its 8 frames"):
        beside.rows(clips.samples.row(0)._replace(frames=8))


def test_the_same_sample_twice(tmp_path: Path) -> None:
    poses = make(tmp_path, "poses", {"a": 5})
    again = Plan([poses.sources[0], replace(poses.sources[0])], PlanOptions("clip", shuffle=False))
    with pytest.raises(DataError, match="two samples have the same corpus and id"):
        Beside(again)
