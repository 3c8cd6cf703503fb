"""Keypoint files of MMPose, MediaPipe and OpenPose, ``.pose`` files and pickles: the same keypoints from each."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError
from shards.media.pose_binary import read_pickle, read_pose
from shards.media.pose_files import one_person, read_points
from shards.media.pose_json import read_folder, read_json
from shards.media.poses import PoseFiles
from shards.schema import RowsFile
from tests.unit.shards.media.test_poses import person


def points_of(path: Path) -> np.ndarray:
    return read_points(path, "xyc")[0]


def mmpose(frames: list[list[np.ndarray]]) -> dict[str, Any]:
    """What MMPose's inferencer writes for a video."""
    info = [
        {
            "frame_id": number,
            "instances": [{"keypoints": who[:, :2].tolist(), "keypoint_scores": who[:, 2].tolist()} for who in people],
        }
        for number, people in enumerate(frames)
    ]
    return {"meta_info": {"dataset_name": "coco_wholebody"}, "instance_info": info[::-1]}


def test_mmpose_takes_the_most_confident_person(tmp_path: Path) -> None:
    signer = person(3)
    other = person(3, seed=1) * (1, 1, 0.5)
    frames = [[other[0], signer[0]], [signer[1], other[1]], []]
    (tmp_path / "a.json").write_text(json.dumps(mmpose(frames)))
    np.testing.assert_allclose(points_of(tmp_path / "a.json"), [signer[0], signer[1], np.zeros((133, 3))])


def landmarks(rows: np.ndarray, visible: bool) -> list[dict[str, float]]:
    return [
        {"x": x, "y": y, "z": 0.1} | ({"visibility": c} if visible else {}) for x, y, c in rows.tolist()
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["list", "frames", "nested", "landmark"])
def test_mediapipe(form: str, tmp_path: Path) -> None:
    points = person(2, "mediapipe")
    points[:, 33:, 2] = 1.0  # faces and hands have no visibility
    points[1, 501:522] = 0.0  # no left hand
    frames = []
    for rows in points:
        frame: dict[str, Any] = {"pose_landmarks": landmarks(rows[:33], True)}
        parts = {"face": rows[33:501], "left_hand": rows[501:522], "right_hand": rows[522:]}
        frame |= {f"{name}_landmarks": landmarks(part, False) if part.any() else None for name, part in parts.items()}
        if form == "nested":
            frame = {name: part and [part] for name, part in frame.items()}
        if form == "landmark":
            frame = {name: part and {"landmark": part} for name, part in frame.items()}
        frame["face_landmarks"] = frame["face_landmarks"] or []
        frames.append(frame)
    (tmp_path / "a.json").write_text(json.dumps({"fps": 30, "frames": frames} if form == "frames" else frames))
    found, rate = read_points(tmp_path / "a.json", "xyc")
    assert rate == (30.0 if form == "frames" else 0.0)
    np.testing.assert_allclose(found, points)


def openpose(folder: Path, points: np.ndarray) -> Path:
    folder.mkdir()
    for number, rows in enumerate(points, 3):
        parts = {"pose": rows[:25], "face": rows[25:95], "hand_left": rows[95:116], "hand_right": rows[116:]}
        who = {f"{name}_keypoints_2d": part.flatten().tolist() for name, part in parts.items()}
        who["face_keypoints_2d"] = who["face_keypoints_2d"] if rows[25:95].any() else []
        file = folder / f"clip_{number:012d}_keypoints.json"
        file.write_text(json.dumps({"version": 1.3, "people": [who] if rows.any() else []}))
    return folder


def test_openpose(tmp_path: Path) -> None:
    points = person(3, "openpose")
    points[1, 25:95] = 0.0
    points[2] = 0.0
    np.testing.assert_allclose(points_of(openpose(tmp_path / "clip", points)), points)
    rows = PoseFiles("openpose", 25).read(RowsFile(tmp_path / "clip"))
    assert rows.shape == (3, 3 * 124) and (rows[2] == 0).all()


def pose_bytes(points: np.ndarray, version: float, parts: list[tuple[str, int]], rate: float = 25.0) -> bytes:
    """A ``.pose`` file with depth, as docs/specs of the format says: header, points, confidences."""
    text = lambda value: struct.pack("<H", len(value)) + value.encode()  # noqa: E731
    data = struct.pack("<fHHHH", version, 1280, 720, 0, len(parts))
    for name, count in parts:
        data += text(name) + text("XYZC") + struct.pack("<HHH", count, 1, 1)
        data += b"".join(text(f"p{number}") for number in range(count)) + struct.pack("<HHHHH", 0, 1, 255, 0, 0)
    frames = len(points)
    data += struct.pack("<HHH", int(rate), frames, 1) if version < 0.15 else struct.pack("<fIH", rate, frames, 1)
    xyz = np.concatenate((points[..., :2], np.full((*points.shape[:2], 1), 7.0)), axis=-1)
    return data + xyz[:, None].astype("<f4").tobytes() + points[:, None, :, 2].astype("<f4").tobytes()


MEDIAPIPE = [
    ("POSE_LANDMARKS", 33), ("FACE_LANDMARKS", 468), ("LEFT_HAND_LANDMARKS", 21), ("RIGHT_HAND_LANDMARKS", 21),
]  # fmt: skip


@pytest.mark.parametrize("version", [0.1, 0.2])
def test_pose_files(version: float, tmp_path: Path) -> None:
    points = person(4, "mediapipe")
    points[2, 522:] = 0.0
    world = np.concatenate((points, points[:, :33] * 9), axis=1)
    (tmp_path / "a.pose").write_bytes(pose_bytes(world, version, [*MEDIAPIPE, ("POSE_WORLD_LANDMARKS", 33)]))
    found, rate = read_points(tmp_path / "a.pose", "xyc")
    assert rate == 25.0
    np.testing.assert_allclose(found, points, rtol=1e-6)
    half = PoseFiles("mediapipe", 12.5).read(RowsFile(tmp_path / "a.pose"))
    assert len(half) == 2


def test_irises_are_left_out(tmp_path: Path) -> None:
    points = person(2, "mediapipe")
    more = np.concatenate((points[:, :501], points[:, :10], points[:, 501:]), axis=1)
    parts = [(name, 478 if name == "FACE_LANDMARKS" else count) for name, count in MEDIAPIPE]
    (tmp_path / "a.pose").write_bytes(pose_bytes(more, 0.2, parts))
    np.testing.assert_allclose(points_of(tmp_path / "a.pose"), points, rtol=1e-6)


def test_damaged_pose_files(tmp_path: Path) -> None:
    whole = pose_bytes(person(4, "mediapipe"), 0.2, MEDIAPIPE)
    (tmp_path / "a.pose").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"not a readable \.pose file"):
        read_pose(tmp_path / "a.pose")
    (tmp_path / "a.pose").write_bytes(struct.pack("<f", 0.9) + whole[4:])
    with pytest.raises(DataError, match=r"\.pose version 0\.9, readable are 0\.1 and 0\.2"):
        read_pose(tmp_path / "a.pose")


def test_pickled_arrays(tmp_path: Path) -> None:
    points = person(3)
    content = {"keypoints": [rows[None, :, :2] for rows in points], "scores": [rows[None, :, 2] for rows in points]}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    np.testing.assert_allclose(points_of(tmp_path / "a.pkl"), points)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"keypoints": np.zeros((3, 133, 2)), "scores": np.zeros((3, 133))}))
    with pytest.raises(DataError, match=r"keypoints \[3, 133, 2\] and scores \[3, 133\]"):
        read_pickle(tmp_path / "a.pkl")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit",))


def test_pickles_run_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"keypoints": Evil(), "scores": []}))
    with pytest.raises(DataError, match=r"it needs builtins\.exec, which is not an array of numpy"):
        read_pickle(tmp_path / "a.pkl")


def test_json_of_another_form(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content, message in (
        ("{", "not a readable JSON file"),
        ('{"poses": []}', "neither MMPose's instance_info nor frames of MediaPipe"),
        ('{"instance_info": [{"frame_id": 0}]}', "keypoints of another form .*instances"),
        ('[{"pose_landmarks": [{"x": 1}]}]', "keypoints of another form .*'y'"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            read_json(file)


def test_folders_of_another_form(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \*_keypoints\.json"):
        read_folder(tmp_path)
    folder = openpose(tmp_path / "clip", person(3, "openpose"))
    (folder / "clip_000000000004_keypoints.json").unlink()
    with pytest.raises(DataError, match="frame 4 is missing"):
        read_folder(folder)
    (folder / "clip_000000000004_keypoints.json").write_text('{"people": [{"pose_keypoints_2d": [1, 2]}]}')
    with pytest.raises(DataError, match="not of OpenPose's form"):
        read_folder(folder)


def test_people_that_cannot_be_one_signer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds nobody in any frame"):
        one_person([[], []], tmp_path)
    with pytest.raises(DataError, match=r"holds people of \[17, 133\] keypoints"):
        one_person([[person(1)[0]], [np.zeros((17, 3))]], tmp_path)
