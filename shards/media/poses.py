"""Keypoints as rows to store: read, reduced to the joints of a layout, normalised by the shoulders.

A stored row is ``[x, y, confidence]`` of every joint in the order of its layout: x to the right, y down, in shoulder
widths from the middle between the shoulders. A joint that was not found is ``0, 0, 0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, OptionError
from shards.media.pose_files import read_points
from shards.media.pose_layouts import LAYOUTS, NORMALISATION, PoseLayout
from shards.media.rows import STORED, Rows, as_stored, cut
from shards.schema import RowsFile
from shards.wording import listed

POSE = "pose"
"""``kind`` of sets of keypoints."""
CHANNELS = 3
"""Numbers per stored joint: x, y and confidence."""
_SAME_RATE = 0.01


@dataclass(frozen=True, slots=True)
class PoseFiles:
    """Files of keypoints, one person each."""

    layout: str
    """Estimator that wrote them, a name of `LAYOUTS`: coco_wholebody (RTMPose, DWPose), openpose, mediapipe."""
    rate: float
    """Stored frames per second; also of the files, where they do not say (a `.pose` file does)."""
    columns: str = "xyc"
    """What an ``.npy`` file holds of every keypoint: x and y, z (not used), c (confidence). Without c a keypoint that
    is not a number, or is 0 in every column, was not found."""
    aspect: float = 1.0
    """Width by height of the picture, where x and y are fractions of its sides (MediaPipe); 1 for pixels."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise OptionError(f"unknown layout {self.layout!r}", where="pose files", fix=f"use {', '.join(LAYOUTS)}")
        if sorted(self.columns) not in [sorted(known) for known in ("xy", "xyc", "xyz", "xyzc")]:
            raise OptionError(
                f"columns {self.columns!r} do not hold x and y once, and z and c at most once",
                where="pose files",
                fix="write the columns of your files in their order, for example columns=xyzc",
            )
        if not (self.rate > 0 and self.aspect > 0):
            raise OptionError(
                f"rate {self.rate:g} and aspect {self.aspect:g} must be positive",
                where="pose files",
                fix="give frames per second, and width divided by height",
            )

    @property
    def keypoints(self) -> PoseLayout:
        """Which keypoints the files hold and which are stored."""
        return LAYOUTS[self.layout]

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> PoseFiles:
        """The form of a manifest or an export. Raises KeyError for a record without these fields."""
        return cls(*(values[name] for name in ("layout", "rate", "columns", "aspect")))

    def read(self, media: RowsFile) -> Rows:
        """Rows float16 [T, joints * 3].

        Raises:
            DataError: an unreadable file, another number of keypoints than the layout's, no frame with both shoulders,
                or an empty part.
        """
        points_TKC, rate = read_points(media.path, self.columns)
        layout = self.keypoints
        if points_TKC.shape[1] != layout.points:
            fitting = [known.name for known in LAYOUTS.values() if known.points == points_TKC.shape[1]]
            raise DataError(
                f"holds {points_TKC.shape[1]} keypoints per frame, the layout {self.layout} has {layout.points}",
                where=str(media.path),
                fix=f"use layout={fitting[0]}" if fitting else "name the estimator that wrote the file as layout",
            )
        points_TKC = resampled(points_TKC, rate, self.rate) if rate else points_TKC
        points_TKC = cut(points_TKC, media, self.rate)
        points_TKC[..., 0] *= self.aspect
        return as_stored(normalise(points_TKC, layout, media.path).reshape(len(points_TKC), -1), media.path)

    def record(self) -> dict[str, Any]:
        form = {"layout": self.layout, "rate": self.rate, "columns": self.columns, "aspect": self.aspect}
        width = CHANNELS * len(self.keypoints.chosen)
        stored = {"fingerprint": self.keypoints.fingerprint, "width": width, "dtype": STORED.str}
        return {"kind": POSE, **form, **stored, "joints": self.keypoints.joints, "normalisation": NORMALISATION}


def normalise(points_TKC: NDArray[np.float64], layout: PoseLayout, path: Path | str) -> NDArray[np.float64]:
    """Keypoints of a file -> stored joints, float64 [T, J, 3].

    The middle of the shoulders becomes the origin and their distance the unit: the medians over the clip's frames that
    show both, so that a turn or a step of the signer stays visible.

    Args:
        points_TKC: x, y in units of equal length, confidence; [T, layout.points, 3]. Confidence 0 = not found.
        layout: which keypoints to keep.
        path: for the message.

    Raises:
        DataError: no frame shows both shoulders, or they are at the same place.
    """
    left, right = (points_TKC[:, number] for number in layout.shoulders)
    both = (left[:, 2] > 0) & (right[:, 2] > 0)
    between = np.linalg.norm(left[both, :2] - right[both, :2], axis=1)
    unit = float(np.median(between)) if both.any() else 0.0
    if not unit > 0:
        what = "both shoulders are at the same place" if both.any() else "no frame shows both shoulders"
        raise DataError(
            f"{what}, so nothing says where the signer is and how large",
            where=str(path),
            fix="look at the keypoints of this file, and whether its layout is the declared one",
        )
    centre = np.median((left[both, :2] + right[both, :2]) / 2, axis=0)
    joints_TJC = points_TKC[:, layout.chosen].copy()
    found_TJ = joints_TJC[..., 2] > 0
    joints_TJC[..., :2] = (joints_TJC[..., :2] - centre) / unit
    joints_TJC[..., 2] = joints_TJC[..., 2].clip(max=1.0)
    return np.where(found_TJ[..., None], joints_TJC, 0.0)


def resampled(rows: NDArray[Any], rate: float, wanted: float) -> NDArray[Any]:
    """Rows nearest in time at another rate; unchanged where the rates agree within one percent."""
    if abs(rate - wanted) <= _SAME_RATE * wanted:
        return rows
    count = max(1, round(len(rows) * wanted / rate))
    middle = (np.arange(count) + 0.5) * rate / wanted
    return rows[np.minimum(middle.astype(int), len(rows) - 1)]


def describe(layout: PoseLayout) -> str:
    """Groups of a layout and their sizes in words."""
    return listed({group: len(numbers) for group, numbers in layout.groups.items()})
