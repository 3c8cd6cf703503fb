"""Which keypoints each pose estimator writes, in which order, and which of them are stored.

Stored joints stand in groups: body, left_hand, right_hand, face. Legs are left out: signing does not use them and
broadcasts hide them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

NORMALISATION = 1
"""Raised when `shards.media.poses.normalise` gives other numbers: stored poses of before are then another input."""
BODY, LEFT_HAND, RIGHT_HAND, FACE = "body", "left_hand", "right_hand", "face"
_FINGERS = ("thumb", "index", "middle", "ring", "little")


@dataclass(frozen=True, slots=True)
class PoseLayout:
    """Keypoints of one estimator."""

    name: str
    points: int
    """Keypoints of a person in its files."""
    body_names: tuple[str, ...]
    """Names of the stored joints of the body."""
    body: tuple[int, ...]
    """Their numbers in the files."""
    hands: tuple[int, int]
    """Number of the first joint of the left and of the right hand."""
    face: tuple[int, ...]
    hand_joints: int = 21

    @property
    def groups(self) -> dict[str, list[int]]:
        """Numbers in the files of the joints of every group, in the order in which they are stored."""
        left, right = (list(range(first, first + self.hand_joints)) for first in self.hands)
        return {BODY: list(self.body), LEFT_HAND: left, RIGHT_HAND: right, FACE: list(self.face)}

    @property
    def chosen(self) -> list[int]:
        """Numbers in the files of all stored joints."""
        return [number for numbers in self.groups.values() for number in numbers]

    @property
    def sizes(self) -> list[int]:
        """Joints of every group."""
        return [len(numbers) for numbers in self.groups.values()]

    @property
    def shoulders(self) -> tuple[int, int]:
        """Numbers of both shoulders in the files."""
        left, right = (self.body[self.body_names.index(f"{side}_shoulder")] for side in ("left", "right"))
        return left, right

    @property
    def joints(self) -> dict[str, list[str]]:
        """Names of the stored joints by group."""
        return {
            group: list(self.body_names) if group == BODY else _names(group, len(numbers))
            for group, numbers in self.groups.items()
        }

    @property
    def fingerprint(self) -> str:
        """Identity of stored keypoints: which they are, and how they are normalised."""
        identity = ["pose", self.name, self.groups, self.shoulders, NORMALISATION]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _names(group: str, count: int) -> list[str]:
    """Names of a hand's 21 joints (wrist, then four of each finger), or numbers."""
    if group != FACE and count == 21:
        return ["wrist", *(f"{finger}_{joint}" for finger in _FINGERS for joint in range(1, 5))]
    return [f"{group}_{number}" for number in range(count)]


_SIDES = ("shoulder", "elbow", "wrist")
_COCO_BODY = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear",
    *(f"{side}_{joint}" for joint in _SIDES for side in ("left", "right")),
)  # fmt: skip
_OPENPOSE_BODY = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip
_MEDIAPIPE_BODY = (
    "nose", "left_eye_inner", "left_eye", "left_eye_outer", "right_eye_inner", "right_eye", "right_eye_outer",
    "left_ear", "right_ear", "mouth_left", "mouth_right",
    *(f"{side}_{joint}" for joint in _SIDES for side in ("left", "right")),
)  # fmt: skip
# Lips, eyes and eyebrows of MediaPipe's face mesh (FACEMESH_LIPS, _LEFT_EYE, _RIGHT_EYE, _LEFT_EYEBROW, ...).
_FACE_MESH = (
    61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 185, 40, 39, 37, 0, 267, 269, 270, 409,
    78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 191, 80, 81, 82, 13, 312, 311, 310, 415,
    263, 249, 390, 373, 374, 380, 381, 382, 362, 466, 388, 387, 386, 385, 384, 398,
    33, 7, 163, 144, 145, 153, 154, 155, 133, 246, 161, 160, 159, 158, 157, 173,
    276, 283, 282, 295, 285, 300, 293, 334, 296, 336, 46, 53, 52, 65, 55, 70, 63, 105, 66, 107,
)  # fmt: skip
_SYNTHETIC_BODY = tuple(f"{side}_{joint}" for joint in _SIDES for side in ("left", "right"))
SYNTHETIC_HAND = 10
"""Joints of a hand of the synthetic corpus: its middle, eight points of its outline, the nearest covered point."""

_FACE_MESH_BEGINS = 33

LAYOUTS = {
    layout.name: layout
    for layout in (
        # 17 of COCO, 6 of the feet, 68 of the face, 21 of each hand
        PoseLayout("coco_wholebody", 133, _COCO_BODY, tuple(range(11)), (91, 112), tuple(range(23, 91))),
        # BODY_25, then face, left hand, right hand
        PoseLayout(
            "openpose", 137, _OPENPOSE_BODY, (*range(8), *range(15, 19)), (95, 116), tuple(range(25, 95))
        ),
        # pose, face, left hand, right hand: the order of MediaPipe Holistic in `.pose` files
        PoseLayout(
            "mediapipe", 543, _MEDIAPIPE_BODY, tuple(range(17)), (501, 522),
            tuple([_FACE_MESH_BEGINS + number for number in _FACE_MESH]),
        ),
        PoseLayout(
            "synthetic", 30, _SYNTHETIC_BODY, tuple(range(6)), (6, 16), tuple(range(26, 30)), SYNTHETIC_HAND
        ),
    )
}  # fmt: skip
