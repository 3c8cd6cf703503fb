"""Decoded frames -> the RGB square that models see, and where in the frame it lies.

A placement costs nothing: frames are scaled from the stored size to the model's in any case, and another scale and
another cut are as quick.
"""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from shards.media.picture import tag_colours


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the square lies in the frame. The default is the usual one: the whole short side, at the centre."""

    zoom_x: float = 1.0
    """How much wider than usual the picture is in the square; the square shows the part ``1 / zoom_x`` of its width."""
    zoom_y: float = 1.0
    """The same for the height."""
    right: float = 0.0
    """How far the square's centre lies to the right of the frame's, in sides of the square."""
    down: float = 0.0
    """How far below."""
    mirrored: bool = False
    """Left and right swapped, after the cut."""


USUAL = Placement()


def rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, size: int | None, placement: Placement = USUAL
) -> np.ndarray:
    """A decoded frame as RGB [H, W, 3].

    Args:
        frame: as decoded.
        reformatter: kept from frame to frame.
        size: side of the square in pixels; None = the stored frame as it is.
        placement: where the square lies; what lies outside the frame repeats its edges.
    """
    tag_colours(frame)
    if size is None:
        return reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    scale = size / min(frame.width, frame.height)
    width = max(1, round(frame.width * scale * placement.zoom_x))
    height = max(1, round(frame.height * scale * placement.zoom_y))
    image = reformatter.reformat(
        frame, width=width, height=height, format="rgb24", interpolation="FAST_BILINEAR", threads=1
    ).to_ndarray()
    top, left = (height - size) // 2 + round(placement.down * size), (width - size) // 2 + round(placement.right * size)
    square = _cut(image, top, left, size)
    return square[:, ::-1] if placement.mirrored else square


def _cut(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    """The square at a place that may reach outside, where the edges are repeated."""
    height, width = image.shape[:2]
    if 0 <= top <= height - size and 0 <= left <= width - size:
        return image[top : top + size, left : left + size]
    rows = np.clip(np.arange(top, top + size), 0, height - 1)
    columns = np.clip(np.arange(left, left + size), 0, width - 1)
    return image[rows].take(columns, axis=1)


__all__ = ["USUAL", "Placement", "rgb"]
