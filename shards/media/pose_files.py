"""Reads keypoint files of the usual estimators: one person, x, y and confidence of every keypoint and frame.

Where a file holds several people, the one whose keypoints are most confident together is taken, frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.media.pose_binary import read_pickle, read_pose
from shards.media.pose_json import Person, read_folder, read_json
from shards.media.rows import FIX_FILE, load_array

Points = NDArray[np.float64]
"""[T, K, 3]: x, y, confidence; not found = 0, 0, 0."""


def read_points(path: Path, columns: str) -> tuple[Points, float]:
    """Keypoints of a file, and its frames per second; 0 where it does not say.

    Args:
        path: an ``.npy`` of [T, K, len(columns)], a ``.json``, ``.pkl`` or ``.pose`` file, or a folder of OpenPose.
        columns: what the last axis of an ``.npy`` holds.

    Raises:
        DataError: an unreadable file, one without frames or people, or of another shape.
    """
    suffix = path.suffix.lower()
    reader = read_folder if path.is_dir() else _PEOPLE.get(suffix)
    if reader is None and suffix != ".npy":
        raise DataError(
            f"no keypoint file: the name ends in {path.suffix!r}",
            where=str(path),
            fix=f"readable are {', '.join(['.npy', *_PEOPLE])} and folders of OpenPose",
        )
    if reader is None:
        points_TKC, rate = _array(path, columns)
    else:
        people, rate = reader(path)
        points_TKC = one_person(people, path)
    if not len(points_TKC):
        raise DataError("holds no frame", where=str(path), fix=FIX_FILE)
    return points_TKC, rate


def with_confidence(values_TKC: NDArray[np.float64], columns: str) -> Points:
    """x, y and confidence from the named columns. What is not a number was not found; without ``c`` also what is 0 in
    every column."""
    x, y = (values_TKC[..., columns.index(name)] for name in "xy")
    found = np.isfinite(values_TKC).all(-1)
    if "c" in columns:
        confidence = np.where(found, values_TKC[..., columns.index("c")], 0.0)
    else:
        confidence = (found & (values_TKC != 0).any(-1)).astype(np.float64)
    points = np.stack((x, y, confidence), axis=-1)
    return np.where((confidence > 0)[..., None], points, 0.0)


def _array(path: Path, columns: str) -> tuple[Points, float]:
    values = load_array(path)
    if values.ndim != 3 or values.shape[2] != len(columns):
        raise DataError(
            f"holds {list(values.shape)}, expected [frames, keypoints, {len(columns)}] for the columns {columns}",
            where=str(path),
            fix="name the columns of the last axis in their order: columns=xy, xyc, xyz or xyzc",
        )
    return with_confidence(values.astype(np.float64), columns), 0.0


def one_person(frames: Iterable[Iterable[Person]], path: Path) -> Points:
    """The most confident person of every frame; a frame without anybody is all zeros.

    Raises:
        DataError: nobody in any frame, or people with different numbers of keypoints.
    """
    chosen = [max(people, key=lambda person: person[:, 2].sum(), default=None) for people in frames]
    counts = {len(person) for person in chosen if person is not None}
    if len(counts) != 1:
        what = f"people of {sorted(counts)} keypoints" if counts else "nobody in any frame"
        raise DataError(f"holds {what}", where=str(path), fix=FIX_FILE)
    nobody = np.zeros((counts.pop(), 3))
    points = np.stack([nobody if person is None else person for person in chosen])
    return with_confidence(points, "xyc")


_PEOPLE: dict[str, Callable[[Path], tuple[Any, float]]] = {
    ".json": read_json, ".pkl": read_pickle, ".pickle": read_pickle, ".pose": read_pose,
}  # fmt: skip
"""By the suffix of the name: formats that may hold several people, and say themselves which columns they have."""
