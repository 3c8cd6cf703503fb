"""JSON of pose estimators: MMPose (RTMPose), MediaPipe Holistic, and OpenPose's folders of one file per frame."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.media.pose_binary import FACE_MESH, FIX

_OPENPOSE = (
    ("pose_keypoints_2d", 25), ("face_keypoints_2d", 70),
    ("hand_left_keypoints_2d", 21), ("hand_right_keypoints_2d", 21),
)  # fmt: skip
_MEDIAPIPE = (
    ("pose_landmarks", 33), ("face_landmarks", FACE_MESH), ("left_hand_landmarks", 21), ("right_hand_landmarks", 21)
)  # fmt: skip
_NUMBER = re.compile(r"(\d+)_keypoints\.json")
_FOREIGN = (ValueError, KeyError, TypeError, IndexError, AttributeError)
Person = NDArray[np.float64]
"""[K, 3]: x, y, confidence."""


def read_json(path: Path) -> tuple[list[list[Person]], float]:
    """People of every frame of a file, and its rate (0: it does not say).

    A file of MMPose's inferencer holds ``instance_info``; one of MediaPipe is a list of frames (or has it under
    ``frames``, perhaps with ``fps``) whose entries are ``pose_landmarks``, ``face_landmarks``,
    ``left_hand_landmarks`` and ``right_hand_landmarks``, each a list of ``{x, y, visibility}`` or null.

    Raises:
        DataError: unreadable, or of another form.
    """
    content = _load(path)
    rate = 0.0
    try:
        if isinstance(content, dict) and "frames" in content:
            rate, content = float(content.get("fps", 0.0)), content["frames"]
        if isinstance(content, dict) and "instance_info" in content:
            frames = sorted(content["instance_info"], key=lambda frame: frame["frame_id"])
            return [[_mmpose(person) for person in frame["instances"]] for frame in frames], rate
        if isinstance(content, list) and all("pose_landmarks" in frame for frame in content):
            return [[_mediapipe(frame)] for frame in content], rate
    except _FOREIGN as error:
        raise DataError(f"keypoints of another form ({error!r})", where=str(path), fix=FIX) from error
    raise DataError(
        "neither MMPose's instance_info nor frames of MediaPipe with pose_landmarks",
        where=str(path),
        fix="convert it to an .npy of [frames, keypoints, 3], or to a .pose file",
    )


def read_folder(path: Path) -> tuple[list[list[Person]], float]:
    """People of every frame of a folder of OpenPose: ``NAME_000000000017_keypoints.json``.

    Raises:
        DataError: no such file in it, numbers with gaps, or a file of another form.
    """
    files = {int(match[1]): file for file in path.iterdir() if (match := _NUMBER.search(file.name))}
    if not files:
        raise DataError("holds no *_keypoints.json", where=str(path), fix="name the folder OpenPose wrote its JSON to")
    numbers = sorted(files)
    if len(numbers) != numbers[-1] - numbers[0] + 1:
        missing = next(number for number in range(numbers[0], numbers[-1]) if number not in files)
        raise DataError(f"frame {missing} is missing", where=str(path), fix="complete the folder")
    frames = []
    for number in numbers:
        try:
            frames.append([_openpose(person) for person in _load(files[number])["people"]])
        except _FOREIGN as error:
            raise DataError(f"not of OpenPose's form ({error!r})", where=str(files[number]), fix=FIX) from error
    return frames, 0.0


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"not a readable JSON file ({error})", where=str(path), fix=FIX) from error


def _mmpose(person: Any) -> Person:
    xy, score = np.asarray(person["keypoints"], np.float64), np.asarray(person["keypoint_scores"], np.float64)
    return np.concatenate((xy[:, :2], score[:, None]), axis=1)


def _openpose(person: Any) -> Person:
    parts = [np.asarray(person.get(name) or [0.0] * (3 * points), np.float64).reshape(-1, 3)
             for name, points in _OPENPOSE]  # fmt: skip
    return np.concatenate(parts)


def _mediapipe(frame: Any) -> Person:
    return np.concatenate([_landmarks(frame.get(name), points) for name, points in _MEDIAPIPE])


def _landmarks(found: Any, points: int) -> Person:
    """One part of a body; zeros where nothing was found. Faces and hands have no visibility: they are there or not."""
    if isinstance(found, dict):
        found = found["landmark"]
    if found and isinstance(found[0], Sequence):  # the newer interface lists several people
        found = found[0]
    if not found:
        return np.zeros((points, 3))
    rows = [(point["x"], point["y"], point.get("visibility") or (1.0 if points != 33 else 0.0)) for point in found]
    return np.asarray(rows[:points] if points == FACE_MESH else rows, np.float64)
