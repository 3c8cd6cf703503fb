"""What training changes in a clip before the model sees it: one function per step, the same change for all its frames.

`Augment` draws everything from the showing of the clip (:mod:`shards.load.draws`). Each function takes its random
numbers as arguments and takes all of them whatever the settings, so that switching one on changes nothing else. What
concerns time and place is decided before anything is decoded: which frames, and which square of them.

Shape suffixes: T frames, H W image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.augment_schema import AugmentConfig
from pipeline.errors import RecipeError
from pipeline.inference.pose_augment import CHANCES, move_joints
from shards.load.draws import Draw, Purpose, turn
from shards.load.features import read_views
from shards.load.reader import SampleReader
from shards.media.square import Placement
from shards.order.plan import Plan

Frames = NDArray[np.uint8]
Affine = NDArray[np.float32]
"""[3, 4]: red, green and blue are each a sum of the three times a factor, and a constant."""

_MIDDLE = 127.5
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
"""NTSC's lightness (that of ITU-R BT.601) and two axes of colour, from red, green and blue."""


@dataclass(frozen=True, slots=True)
class Augment:
    """The augmentations of a recipe.

    Args:
        config: how strong they are.
        seed: of the plan.
    """

    config: AugmentConfig
    seed: int

    def frames(
        self, reader: SampleReader, sample: int, showing: int, numbers: list[int], pixels: int
    ) -> NDArray[np.uint8]:
        """Decoded frames [T, ``pixels``, ``pixels``, 3] of these numbers, augmented."""
        distinct, places = np.unique(numbers, return_inverse=True)
        frames_THWC = reader.decoded(sample, distinct.tolist(), pixels, self.placement(sample, showing))
        self.picture(frames_THWC, sample, showing)
        return frames_THWC if len(distinct) == len(numbers) else frames_THWC[places]

    def features(self, reader: SampleReader, sample: int, showing: int, numbers: list[int]) -> NDArray[np.float16]:
        """Stored features [T, P] of these frames, of one of the clip's views; each view has its turn."""
        views_KTP = read_views(reader, sample)
        wanted = self.config.of_pictures()
        view = turn(Purpose.VIEW, self.seed, sample, showing, len(views_KTP)) if wanted else 0
        return views_KTP[view][numbers]

    def keypoints(self, rows_TK: NDArray[np.float16], sample: int, showing: int) -> NDArray[np.float16]:
        """Keypoints [T, 3 J] of a clip, moved and thinned out."""
        joints = rows_TK.shape[1] // 3
        return move_joints(
            rows_TK, self.config, Draw(Purpose.KEYPOINTS, self.seed, sample, showing).randoms(CHANCES + joints)
        )

    def frame_numbers(self, sample: int, showing: int, stored: int, max_frames: int, stride: int) -> list[int]:
        """Numbers of the stored frames to show, in order; a slowed clip repeats some.

        Args:
            sample: its number in the plan.
            showing: how often it was shown before.
            stored: frames of the clip.
            max_frames: show at most so many.
            stride: choose among every n-th stored frame.
        """
        draw = Draw(Purpose.TIME, self.seed, sample, showing)
        part, place, speed = draw.random(), draw.random(), draw.random()
        strided = range(0, stored, stride)
        kept = temporal_crop(len(strided), between(self.config.keep_part, part), place)
        shown = at_speed(kept, between(self.config.speed, speed), max_frames)
        return [strided[number] for number in drop_frames(shown, self.config.drop_frames, draw.randoms(len(shown) + 1))]

    def placement(self, sample: int, showing: int) -> Placement:
        """Where in the frames the square lies: crop, scale, shift, flip."""
        return placement(self.config, Draw(Purpose.PLACE, self.seed, sample, showing).randoms(8))

    def picture(self, frames_THWC: Frames, sample: int, showing: int) -> Frames:
        """Colours and erasing; uint8 [T, H, W, 3] in and out, changed in place."""
        draw = Draw(Purpose.PICTURE, self.seed, sample, showing)
        recolour(frames_THWC, colours(self.config, draw.randoms(5)))
        chances = draw.randoms(8)
        if chances[0] < self.config.erase:
            erase(frames_THWC, between(self.config.erase_area, chances[1]), chances[2:])
        return frames_THWC


def check_augment(plan: Plan, config: AugmentConfig) -> None:
    """Refuse stored features that were not made with the augmentations of pictures that a recipe asks for.

    Raises RecipeError naming them.
    """
    wanted = config.of_pictures()
    for source in plan.sources if wanted else ():
        manifest = source.shard_set.manifest
        stored = manifest.options.get("features") or {}
        if manifest.kind == "features" and stored.get("augment") != wanted:
            raise RecipeError(
                f"{source.shard_set.dir}: these shards hold frame features,"
                f" {_made_with(stored)}, but data.augment asks for {wanted}. Extract them with these settings (`slt"
                " shards features SHARDS --recipe RECIPE --views 4 --out DIR`), or take the settings of pictures out"
            )


def _made_with(stored: Mapping[str, Any]) -> str:
    return f"their views made with {stored['augment']}" if "augment" in stored else "of clips as they are"


def between(limits: tuple[float, float], number: float) -> float:
    """A number of [0, 1) stretched to two limits."""
    return limits[0] + (limits[1] - limits[0]) * float(number)


def about_one(most: float, number: float) -> float:
    """A factor of at least ``1 - most`` and at most ``1 + most``."""
    return between((1.0 - most, 1.0 + most), number)


# -- which frames --------------------------------------------------------------------------------------------------
def temporal_crop(count: int, part: float, place: float) -> range:
    """This part of ``range(count)``, at least one, beginning at any place of equal chance.

    Args:
        part: of the clip to keep, 0 to 1.
        place: in [0, 1).
    """
    kept = max(1, round(count * part))
    begin = int(place * (count - kept + 1))
    return range(begin, begin + kept)


def at_speed(numbers: range, speed: float, most: int) -> list[int]:
    """Evenly spread numbers of a clip that is played faster or slower: the middles of equal parts, at least one.

    At speed 1 all of them; slower, some twice. With too many, evenly spread ones, as evaluation takes them.
    """
    shown = min(max(1, round(len(numbers) / speed)), most)
    return [numbers[(2 * part + 1) * len(numbers) // (2 * shown)] for part in range(shown)]


def drop_frames(numbers: list[int], probability: float, chances: NDArray[np.float64]) -> list[int]:
    """What is left when each is left out with this probability; where all would be, one of them.

    Args:
        chances: one more than numbers, in [0, 1).
    """
    kept = [number for number, chance in zip(numbers, chances[1:].tolist(), strict=True) if chance >= probability]
    return kept or [numbers[int(chances[0] * len(numbers))]]


# -- which part of the frames --------------------------------------------------------------------------------------
def placement(config: AugmentConfig, chances: NDArray[np.float64]) -> Placement:
    """Where the square lies; ``chances``: 8 in [0, 1).

    A random resized crop (arXiv 1409.4842) of the usual square, then scale and shift of what it shows. The aspect is
    drawn evenly on a logarithmic scale, and a side is at most that of the square.
    """
    area, aspect, x, y, scale, right, down, flip = chances.tolist()
    lowest, highest = config.crop_aspect
    root = math.sqrt(math.exp(between((math.log(lowest), math.log(highest)), aspect)))
    side = math.sqrt(between(config.crop_area, area))
    wide, high = min(1.0, side * root), min(1.0, side / root)
    factor = between(config.scale, scale)
    zoom_x, zoom_y = factor / wide, factor / high
    return Placement(
        zoom_x,
        zoom_y,
        (x - 0.5) * (1.0 - wide) * zoom_x + config.shift * (2 * right - 1),
        (y - 0.5) * (1.0 - high) * zoom_y + config.shift * (2 * down - 1),
        flip < config.flip,
    )


# -- colours -------------------------------------------------------------------------------------------------------
def colours(config: AugmentConfig, chances: NDArray[np.float64]) -> Affine:
    """Brightness, then contrast, saturation and hue as one affine map; ``chances``: 5 in [0, 1).

    Hue turns the plane of I and Q in NTSC's YIQ, which keeps the lightness; grey is no saturation at all.
    """
    brightness, contrast, saturation, hue, grey = chances.tolist()
    bright = about_one(config.brightness, brightness)
    factor = about_one(config.contrast, contrast)
    saturated = 0.0 if grey < config.grey else about_one(config.saturation, saturation)
    angle = 2 * math.pi * config.hue * (2 * hue - 1)
    matrix = np.eye(3) if saturated == 1.0 and not angle else _turned(angle, saturated)
    linear = matrix * (bright * factor)
    # every row of ``matrix`` sums to one: middle grey stays where it is
    constant = np.full((3, 1), _MIDDLE * (1.0 - factor))
    return np.concatenate([linear, constant], axis=1).astype(np.float32)


def _turned(angle: float, saturation: float) -> NDArray[np.float64]:
    cosine, sine = saturation * math.cos(angle), saturation * math.sin(angle)
    turn = np.array([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]])
    to_yiq = np.array(_YIQ)
    matrix: NDArray[np.float64] = np.linalg.inv(to_yiq) @ turn @ to_yiq
    return matrix


def recolour(frames_THWC: Frames, affine: Affine) -> None:
    """Apply a map of colours in place; results are rounded and cut off at 0 and 255.

    Plane by plane and without a matrix product, whose rounding differs between machines and numbers of threads.
    """
    if (affine == np.eye(3, 4, dtype=np.float32)).all():
        return
    pixels = frames_THWC.shape[1] * frames_THWC.shape[2]
    planes_CP = np.empty((3, pixels), np.float32)
    sums_P, products_P = (np.empty(pixels, np.float32) for _ in range(2))
    for frame_PC in frames_THWC.reshape(-1, pixels, 3):
        for plane_P, values_P in zip(planes_CP, frame_PC.T, strict=True):
            plane_P[:] = values_P
        for place, (*factors, constant) in enumerate(affine):
            sums_P.fill(constant + np.float32(0.5))
            for plane_P, factor in zip(planes_CP, factors, strict=True):
                if factor:
                    sums_P += np.multiply(plane_P, factor, out=products_P)
            np.clip(sums_P, 0.0, 255.0, out=sums_P)
            frame_PC[:, place] = sums_P


def erase(frames_THWC: Frames, area: float, chances: NDArray[np.float64]) -> None:
    """Paint a rectangle of one colour over all frames, in place (random erasing, arXiv 1708.04896).

    Args:
        area: its part of the picture.
        chances: 6 in [0, 1): aspect (0.3 to 3.3, evenly on a logarithmic scale), place, colour.
    """
    height, width = frames_THWC.shape[1:3]
    root = math.sqrt(math.exp(between((math.log(0.3), -math.log(0.3)), chances[0])))
    high = min(height, max(1, round(height * math.sqrt(area) / root)))
    wide = min(width, max(1, round(width * math.sqrt(area) * root)))
    top, left = int(chances[1] * (height - high + 1)), int(chances[2] * (width - wide + 1))
    frames_THWC[:, top : top + high, left : left + wide] = (chances[3:] * 256).astype(np.uint8)
