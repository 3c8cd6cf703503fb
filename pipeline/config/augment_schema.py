"""The recipe's sections `data.augment` and `data.references`: what differs from showing to showing of a sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from pipeline.config.section import Section

_LIMITS = {
    "crop_area": (0.05, 1.0), "crop_aspect": (0.5, 2.0), "scale": (0.5, 2.0), "erase_area": (0.001, 0.9),
    "speed": (0.25, 4.0), "keep_part": (0.1, 1.0), "pose_scale": (0.5, 2.0),
}  # fmt: skip
"""Of the settings that are a [lowest, highest] pair: what both must lie between."""
_TIME = ("speed", "drop_frames", "keep_part")
_POSE = ("pose_scale", "pose_turn", "pose_shift", "pose_drop")


class AugmentConfig(Section):
    """Drawn anew whenever a clip is shown, one draw for all of its frames; evaluation shows clips as they are. The
    defaults change nothing (docs/augmentation.md)."""

    crop_area: tuple[float, float] = (1.0, 1.0)
    """Random resized crop: the part of the square's area that is kept, anywhere in it, and enlarged to the square."""
    crop_aspect: tuple[float, float] = (1.0, 1.0)
    """Width over height of that part."""
    scale: tuple[float, float] = (1.0, 1.0)
    """How large the picture appears, about its centre; below 1 shows what is around it, or repeats its edges."""
    shift: float = Field(default=0.0, ge=0, le=0.5)
    """At most so many sides of the square to the left or right, and up or down."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of swapping left and right. Off: which hand signs can mean something."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Colours times a factor of 1 ± this."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    """Distance from middle grey times a factor of 1 ± this."""
    saturation: float = Field(default=0.0, ge=0, le=1)
    """Distance from the grey of the same lightness times a factor of 1 ± this."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Hues turned by at most this part of the colour circle, either way."""
    grey: float = Field(default=0.0, ge=0, le=1)
    """Probability of a clip without colour."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability of one rectangle of a single colour over all frames (random erasing, arXiv 1708.04896)."""
    erase_area: tuple[float, float] = (0.02, 0.2)
    """Its part of the square."""
    speed: tuple[float, float] = (1.0, 1.0)
    """How fast the clip is played: 2 shows every second frame, 0.5 every frame twice; never more than `max_frames`."""
    drop_frames: float = Field(default=0.0, ge=0, lt=1)
    """Probability of leaving out a frame, each by itself; one stays."""
    keep_part: tuple[float, float] = (1.0, 1.0)
    """Temporal crop: the part of the clip that is shown, from anywhere in it. What is cut off is still in the text."""

    pose_scale: tuple[float, float] = (1.0, 1.0)
    """Keypoints: size about the middle of the shoulders."""
    pose_turn: float = Field(default=0.0, ge=0, le=45)
    """Keypoints turned in the picture by at most so many degrees, either way."""
    pose_shift: float = Field(default=0.0, ge=0, le=1)
    """Keypoints moved by at most so many shoulder widths to the left or right, and up or down."""
    pose_drop: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a joint is missing throughout the clip, each by itself."""

    def wrong_pairs(self) -> Iterator[tuple[str, str]]:
        """Name and problem of every pair that is out of order or beyond its limits."""
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if not low <= value[0] <= value[1] <= high:
                yield name, f"must be [lowest, highest] between {low:g} and {high:g}, got {list(value)}"

    def changed(self) -> dict[str, Any]:
        """The settings that are not at their default and change something."""
        unread = set() if self.erase else {"erase_area"}
        return self.model_dump(mode="json", exclude_defaults=True, exclude=unread)

    def of_pictures(self) -> dict[str, Any]:
        """Those that change pictures: stored frame features were made with or without them."""
        return {name: value for name, value in self.changed().items() if name not in (*_TIME, *_POSE)}

    @property
    def shortens(self) -> bool:
        """Whether a clip may be shown with fewer frames than it has."""
        return self.speed[1] > 1 or self.drop_frames > 0 or self.keep_part[0] < 1

    @property
    def slowest(self) -> float:
        """The lowest speed, at most 1: clips may have so many times more frames."""
        return min(1.0, self.speed[0])


class ReferencesConfig(Section):
    """Text columns of the shard sets (`slt shards texts`) that say the same as a sample's own text."""

    train: list[str] = []
    """Training takes one of the sample's texts at every showing, each in its turn; every set of `data.train` needs
    these columns."""
    scored: list[str] = []
    """Held-out translations are scored against all texts of a sample, which raises scores; every set of `data.eval`
    needs these columns."""
