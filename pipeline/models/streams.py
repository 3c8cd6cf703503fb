"""Frames and keypoints of the same clips, together the input of a visual encoder that reads both.

Legend: N packed frames, K numbers of a frame's keypoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Streams(NamedTuple):
    """Two views of the packed frames of a batch, row by row the same moments."""

    frames: Tensor
    """uint8 [N, H, W, 3], or stored features [N, P]."""
    pose_NK: Tensor
    """Keypoints, floats [N, 3 * joints]."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Streams:
        """The same on a device."""
        return Streams(*(part.to(device, non_blocking=non_blocking) for part in self))


Inputs = Tensor | Streams
"""What a visual encoder reads: images, stored rows, or frames with keypoints."""


def frames_of(inputs: Inputs) -> Tensor:
    """The frames, or the only stream there is."""
    return inputs.frames if isinstance(inputs, Streams) else inputs


def with_frames(inputs: Inputs, frames: Tensor) -> Inputs:
    """The same with other frames (their features instead of images); keypoints stay."""
    return Streams(frames, inputs.pose_NK) if isinstance(inputs, Streams) else frames


__all__ = ["Inputs", "Streams", "frames_of", "with_frames"]
