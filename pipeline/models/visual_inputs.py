"""What a visual encoder is given must be what it was built for. Nothing here reads a number from the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.models.clip_layout import ClipLayout, ClipSizes
from pipeline.models.streams import Inputs, Streams, frames_of


class Expected(NamedTuple):
    """What an encoder reads."""

    clips: ClipSizes
    width: int
    """Numbers of a row that may stand for a frame."""
    image_pixels: int
    """Side of an image; 0 without a backbone."""
    beside: int
    """Numbers of the keypoints beside a frame; 0 if it reads one stream only."""


def check_inputs(inputs: Inputs, layout: ClipLayout, expected: Expected) -> None:
    """Refuse inputs or a layout of another shape than the encoder's. Raises DataError: what was given and expected."""
    frames = frames_of(inputs)
    _check_frames(frames, expected)
    _check_pose(inputs, expected)
    if (described := len(layout.frame_samples_N)) != len(frames):
        raise DataError(
            f"frame lengths of {described} frames do not describe {len(frames)} packed frames",
            where="visual encoder",
            fix="pass every sample's frame count, at least 1 each",
        )
    if layout.sizes != expected.clips:
        raise DataError(
            f"the layout was made for {layout.sizes}, the encoder has {expected.clips}",
            where="visual encoder",
            fix="make it with ClipLayout.of(lengths, encoder.config.clip_sizes())",
        )


def _check_frames(frames: Tensor, expected: Expected) -> None:
    side, width = expected.image_pixels, expected.width
    images = side > 0 and tuple(frames.shape[1:]) == (side, side, 3) and frames.dtype == torch.uint8
    rows = tuple(frames.shape[1:]) == (width,) and frames.is_floating_point()
    if images or rows:
        return
    what, fix = f"stored rows (N, {width}), for the encoder has no backbone", "pass what the encoder was built for"
    if side:
        what = f"torch.uint8 (N, {side}, {side}, 3), or stored features (N, {width})"
        fix = "set data.image_pixels to the size the encoder was built with"
    raise DataError(
        f"frames are {frames.dtype} {tuple(frames.shape)}, expected {what}", where="visual encoder", fix=fix
    )


def _check_pose(inputs: Inputs, expected: Expected) -> None:
    fused = expected.beside > 0
    if fused != isinstance(inputs, Streams):
        what = "reads frames and keypoints, only one was given" if fused else "reads one stream, two were given"
        raise DataError(f"the encoder {what}", where="visual encoder", fix="pass Streams to a fused encoder only")
    if isinstance(inputs, Streams) and inputs.pose_NK.shape != (len(inputs.frames), expected.beside):
        raise DataError(
            f"keypoints are {tuple(inputs.pose_NK.shape)}, expected ({len(inputs.frames)}, {expected.beside})",
            where="visual encoder",
            fix="pass one row of keypoints of the encoder's layout per frame",
        )


__all__ = ["Expected", "check_inputs"]
