"""Keypoints of the synthetic signers, in the pose layout ``synthetic``: where the renderer has drawn them."""

from __future__ import annotations

import functools
import math

import numpy as np

from shards.corpora.synthetic_grammar import Point
from shards.corpora.synthetic_render import HAND_STROKES, RING_THICKNESS, ROTATION_STEP, Pose, Rendering, Stage, arm

OUTLINE_POINTS = 8


@functools.lru_cache(maxsize=256)
def hand_points(shape: str, rotation: int, mirrored: bool) -> tuple[Point, ...]:
    """Keypoints of a hand in hand lengths from its middle: the middle, the farthest place in each of eight directions,
    and the covered place nearest to the middle, which tells a ring from a disc."""
    cos, sin = math.cos(rotation * ROTATION_STEP), math.sin(rotation * ROTATION_STEP)
    flip = -1 if mirrored else 1

    def turned(x: float, y: float) -> Point:
        return flip * (x * cos - y * sin), x * sin + y * cos

    strokes = HAND_STROKES[shape]
    ends = [(x, y, abs(radius)) for x0, y0, x1, y1, radius in strokes for x, y in ((x0, y0), (x1, y1))]
    outline = []
    for number in range(OUTLINE_POINTS):
        angle = 2 * math.pi * number / OUTLINE_POINTS
        along = (math.sin(angle), -math.cos(angle))
        x, y, radius = max(ends, key=lambda end: end[0] * along[0] + end[1] * along[1] + end[2])
        outline.append(turned(x + radius * along[0], y + radius * along[1]))
    hollow = max((abs(radius) - RING_THICKNESS for *_, radius in strokes if radius < 0), default=0.0)
    return ((0.0, 0.0), *outline, turned(0.0, -hollow))


def keypoints(signed: Rendering) -> np.ndarray:
    """float32 [frames, joints, 3]: x and y in pixels of a frame, confidence 1."""
    xy_TJ2 = np.asarray([_joints(signed.stage, pose) for pose in signed.poses], dtype=np.float32)
    return np.concatenate((xy_TJ2, np.ones((*xy_TJ2.shape[:2], 1), np.float32)), axis=2)


def _joints(stage: Stage, pose: Pose) -> list[Point]:
    (left, left_elbow), (right, right_elbow) = arm(pose.left, 1), arm(pose.right, -1)
    size = stage.hand_pixels / stage.scale
    hands = [
        (at[0] + size * x, at[1] + size * y)
        for at, shape, mirrored in ((pose.left, pose.left_shape, True), (pose.right, pose.right_shape, False))
        for x, y in hand_points(shape, pose.rotation, mirrored)
    ]
    head = pose.head_shift
    face = [(head, 0.235), (head * 1.5 + 0.038, 0.215), (head * 1.5 - 0.038, 0.215), (head * 1.5, 0.297)]
    points = [left, right, left_elbow, right_elbow, pose.left, pose.right, *hands, *face]
    return [(x / 2, y / 2) for x, y in map(stage.at, points)]  # the canvas is twice as large as a frame
