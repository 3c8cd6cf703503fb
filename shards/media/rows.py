"""Files of precomputed frame features as rows to store: folders of ``.npy`` that other programs have written.

A form says how files are read, at which rate, and what identifies their content. Two exist: features here, keypoints
in `shards.media.poses`. What a form records stands in the manifest under ``options.features``, and an export keeps it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, OptionError
from shards.schema import RowsFile

STORED = np.dtype("<f2")
"""Type of stored rows."""
FIX_FILE = "write the file again, or correct the folder and the options"
Rows = NDArray[np.float16]


class RowsForm(Protocol):
    """How a kind of file becomes rows."""

    @property
    def rate(self) -> float:
        """Rows per second."""
        ...

    def read(self, media: RowsFile) -> Rows:
        """Rows float16 [T, W] of a file or of the part of it. Raises DataError naming the file."""
        ...

    def record(self) -> dict[str, Any]:
        """For the manifest, with ``kind``, ``fingerprint``, ``rate``, ``width`` and ``dtype``."""
        ...


@dataclass(frozen=True, slots=True)
class FeatureFiles:
    """``.npy`` files of floats [T, ``width``], one row per frame or per window of frames."""

    kind: str
    """What made them: ``i3d``, ``s3d``, ``videomae``, ``spamo`` or any other word but ``pose``."""
    fingerprint: str
    """Your name for the weights and the preprocessing that made them; a recipe must name the same."""
    width: int
    """Numbers per row."""
    rate: float
    """Rows per second of video: 25 for one row per frame at 25 frames per second, 3.125 for one per 8 of them."""

    def __post_init__(self) -> None:
        problems = [f"{name} is empty" for name in ("kind", "fingerprint") if not getattr(self, name).strip()]
        if self.kind == "pose":
            problems.append("kind pose is for keypoints")
        if self.width < 1 or not self.rate > 0:
            problems.append(f"width {self.width} and rate {self.rate:g} must be positive")
        if problems:
            raise OptionError("; ".join(problems), where="feature files", fix="correct these options")

    def read(self, media: RowsFile) -> Rows:
        """Rows float16 [T, ``width``].

        Raises:
            DataError: no array, another shape than declared, values that are no finite float16, or an empty part.
        """
        values = load_array(media.path)
        if values.ndim != 2 or values.shape[1] != self.width or not len(values):
            raise DataError(
                f"holds {values.dtype} {list(values.shape)}, declared are rows of {self.width} numbers",
                where=str(media.path),
                fix="declare the width of these files, or write one row per frame: [T, width]",
            )
        return as_stored(cut(values, media, self.rate), media.path)

    def record(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "dtype": STORED.str}


def load_array(path: Path) -> NDArray[Any]:
    """The numbers of an ``.npy`` file. Raises DataError for anything else; nothing in the file is executed."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"not a readable .npy file ({error})", where=str(path), fix=FIX_FILE) from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        what = getattr(values, "dtype", "several arrays")
        raise DataError(f"holds {what}, not one array of numbers", where=str(path), fix=FIX_FILE)
    return values


def cut(rows: NDArray[Any], media: RowsFile, rate: float) -> NDArray[Any]:
    """The rows between the two times of ``media``. Raises DataError when none lies there."""
    begin = round((media.start_seconds or 0.0) * rate)
    end = len(rows) if media.end_seconds is None else round(media.end_seconds * rate)
    part = rows[begin:end]
    if not len(part):
        raise DataError(
            f"no row between {media.start_seconds or 0.0:g} s and {end / rate:g} s: it has {len(rows)} at {rate:g} per"
            " second",
            where=str(media.path),
            fix="correct the times or the rate",
        )
    return part


def as_stored(rows: NDArray[Any], path: Path) -> Rows:
    """Rows as float16. Raises DataError for values that are not finite in it."""
    with np.errstate(over="ignore"):
        stored: Rows = rows.astype(STORED)
    if not np.isfinite(stored).all():
        first = int(np.argwhere(~np.isfinite(stored))[0][0])
        raise DataError(
            f"row {first} holds values beyond the range of float16, or not finite",
            where=str(path),
            fix="scale the features when they are made, or look for broken frames",
        )
    return stored
