"""Folders of numbered images as video: playing order, gaps in the numbers, pixels as 8-bit RGB, upright."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shards.errors import DataError
from shards.media.source import FIX_MEDIA, Timed
from shards.schema import FrameFolder
from shards.wording import first_few

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
_NO_RANGE = frozenset({"I", "F"})  # modes that do not define which value is white


class MissingFrames(DataError):
    """A folder of numbered images with gaps in the numbers."""


def is_frame(path: Path) -> bool:
    """Whether a file is an image of its folder. Hidden files are leftovers of file managers."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def frame_files(media: FrameFolder) -> list[Path]:
    """The images of a folder in playing order: by the number in their names if they have one, else by name.

    Raises:
        DataError: no such folder, or no image in it.
        MissingFrames: the numbers have gaps.
    """
    if not media.path.is_dir():
        raise DataError("no such frame folder", where=str(media.path), fix=FIX_MEDIA)
    files = sorted(path for path in media.path.glob(media.pattern) if is_frame(path))
    if not files:
        raise DataError(f"no image matches {media.pattern}", where=str(media.path), fix=FIX_MEDIA)
    numbers = _numbers([path.stem for path in files])
    if numbers is None:
        return files
    order = sorted(range(len(files)), key=lambda place: numbers[place])
    ordered = sorted(numbers)
    step = min((later - earlier for earlier, later in itertools.pairwise(ordered)), default=1)
    if step == 0:
        twice = next(number for number, later in itertools.pairwise(ordered) if number == later)
        raise DataError(f"two images have the number {twice}", where=str(media.path), fix="remove one of the two")
    missing = sorted(set(range(ordered[0], ordered[-1] + 1, step)) - set(ordered))
    if missing:
        shown = first_few(missing, 5)
        raise MissingFrames(
            f"{len(missing)} of {len(files) + len(missing)} frames are missing: numbers {shown}",
            where=str(media.path),
            fix="unpack the archive again",
        )
    return [files[place] for place in order]


def _numbers(stems: list[str]) -> list[int] | None:
    """The one number in which the names differ; None when they differ in anything else."""
    splits = [re.split(r"(\d+)", stem) for stem in stems]
    if len({len(part) for part in splits}) != 1:
        return None
    columns = list(zip(*splits, strict=True))
    differing = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) != 1 or differing[0] % 2 == 0:  # odd places hold the digits
        return None
    return [int(digits) for digits in columns[differing[0]]]


def folder_frames(media: FrameFolder) -> Iterator[Timed]:
    """(seconds, frame) of a folder of images of one size, and the end. Other files in the folder are ignored."""
    shape: tuple[int, ...] | None = None
    files = frame_files(media)
    for number, path in enumerate(files):
        pixels = _pixels(path)
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise DataError(
                f"{pixels.shape[:2]} pixels, the first frame has {shape[:2]}", where=str(path), fix=FIX_MEDIA
            )
        yield number / media.fps, av.VideoFrame.from_ndarray(pixels, "rgb24")
    yield len(files) / media.fps, None


def _pixels(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] RGB of an image, turned upright as its EXIF orientation says; 16-bit grey is scaled."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                grey = (np.asarray(upright) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            if upright.mode not in _NO_RANGE:
                return np.asarray(upright.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"not a readable image ({error})", where=str(path), fix=FIX_MEDIA) from error
    raise DataError(
        f"pixels of mode {upright.mode!r}, whose range is not known", where=str(path), fix="convert it to 8 or 16 bits"
    )
