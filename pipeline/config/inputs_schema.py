"""The recipe's sections for clips that are no videos: keypoints and features that other programs computed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.section import Section


class PoseConfig(Section):
    """Keypoints of the signer, alone or beside frames: joint groups become one vector per frame (docs/inputs.md)."""

    layout: Literal["coco_wholebody", "openpose", "mediapipe", "synthetic"]
    """Which keypoints the shards hold, as they were built with `--rows-are layout=`."""
    width: int = Field(default=64, gt=0)
    """Width of one group of joints (body, left hand, right hand, face)."""


class FeaturesConfig(Section):
    """Features that another program computed, in place of a backbone (docs/inputs.md)."""

    fingerprint: str = Field(min_length=1)
    """Name of the weights and preprocessing that made them, as the shards were built with."""
    width: int = Field(gt=0)
    """Numbers per row."""
