"""What training changes in a clip's keypoints: one drawn change for all of its frames, about the middle of the
shoulders. Joints that were not found stay so.

Shape suffixes: T frames, J joints, K = 3 J numbers.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.config.augment_schema import AugmentConfig

CHANNELS = 3
CHANCES = 4
"""Random numbers beside one per joint."""


def move_joints(
    rows_TK: NDArray[np.float16], config: AugmentConfig, chances: NDArray[np.float64]
) -> NDArray[np.float16]:
    """Keypoints scaled, turned and shifted, some of the joints missing; a new array.

    Args:
        rows_TK: x, y, confidence of every joint, as stored.
        config: how much.
        chances: [`CHANCES` + J] numbers of [0, 1), all of which are used whatever the settings.
    """
    low, high = config.pose_scale
    scale = low + (high - low) * chances[0]
    angle = math.radians(config.pose_turn) * (2 * chances[1] - 1)
    shift = config.pose_shift * (2 * chances[2:CHANCES] - 1)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    joints_TJC = rows_TK.astype(np.float64).reshape(len(rows_TK), -1, CHANNELS)
    x, y = joints_TJC[..., 0].copy(), joints_TJC[..., 1].copy()
    joints_TJC[..., 0] = cos * x - sin * y + shift[0]
    joints_TJC[..., 1] = sin * x + cos * y + shift[1]
    kept_J = chances[CHANCES:] >= config.pose_drop
    there_TJ = (joints_TJC[..., 2] > 0) & kept_J
    return np.where(there_TJ[..., None], joints_TJC, 0.0).astype(np.float16).reshape(rows_TK.shape)


__all__ = ["CHANCES", "move_joints"]
