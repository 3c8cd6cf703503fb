"""``.pose`` files (github.com/sign-language-processing/pose, versions 0.1 and 0.2) and pickles of keypoint arrays."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError

FIX = "write the file again, or correct the folder and the options"
_ARRAYS = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})
_WORLD = "WORLD"
_DAMAGED = (
    OSError, ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError, pickle.UnpicklingError
)  # fmt: skip
FACE_MESH = 468
"""Points of MediaPipe's face mesh; those of the irises may follow."""


class _Reader:
    """Little-endian values one after another."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        (length,) = self.take("H")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def floats(self, *shape: int) -> NDArray[np.float64]:
        count = int(np.prod(shape))
        values = np.frombuffer(self.data, "<f4", count, self.at)
        self.at += 4 * count
        return values.reshape(shape).astype(np.float64)


def read_pose(path: Path) -> tuple[NDArray[np.float64], float]:
    """People [T, people, K, 3] (x, y, confidence) of a ``.pose`` file without its world coordinates, and its rate.

    Raises:
        DataError: another version, or a damaged file.
    """
    try:
        return _pose(_Reader(path.read_bytes()), path)
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"not a readable .pose file ({error})", where=str(path), fix=FIX) from error


def _pose(reader: _Reader, path: Path) -> tuple[NDArray[np.float64], float]:
    (version,) = reader.take("f")
    reader.take("HHH")  # width, height and depth of the picture
    kept: list[bool] = []
    dims = 0
    for _ in range(reader.take("H")[0]):
        name, columns = reader.text(), reader.text()
        points, limbs, colours = reader.take("HHH")
        for _ in range(points):
            reader.text()
        reader.take("HH" * limbs + "HHH" * colours)
        mesh = name == "FACE_LANDMARKS" and points > FACE_MESH
        kept += [_WORLD not in name and not (mesh and number >= FACE_MESH) for number in range(points)]
        dims = max(dims, len(columns) - 1)
    if round(version, 3) == 0.1:
        rate, _, people = reader.take("HHH")
        frames = (len(reader.data) - reader.at) // max(1, 4 * people * len(kept) * (dims + 1))  # its count may be cut
    elif round(version, 3) == 0.2:
        rate, frames, people = reader.take("fIH")
    else:
        raise DataError(f".pose version {version:g}, readable are 0.1 and 0.2", where=str(path), fix=FIX)
    xyz = reader.floats(frames, people, len(kept), dims)
    confidence = reader.floats(frames, people, len(kept))
    return np.concatenate((xyz[..., :2], confidence[..., None]), axis=-1)[:, :, kept], float(rate)


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds numpy arrays and plain containers; whatever else a file names is refused, not imported."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in _ARRAYS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it needs {module}.{name}, which is not an array of numpy")


def read_pickle(path: Path) -> tuple[NDArray[np.float64], float]:
    """People [T, people, K, 3] of a pickle ``{"keypoints": [T x [people, K, 2]], "scores": [T x [people, K]]}``, as
    RTMPose's scripts for sign language write it (Uni-Sign, arXiv 2501.15187). Rate 0: it does not say.

    Raises:
        DataError: a file that holds something else, or needs code to be read.
    """
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes())).load()
        xy, score = (
            np.stack([np.asarray(frame, dtype=np.float64) for frame in content[name]])
            for name in ("keypoints", "scores")
        )
        people = np.concatenate((xy, score[..., None]), axis=-1)
        if people.ndim != 4 or people.shape[-1] != 3:
            raise ValueError(f"keypoints {list(xy.shape)} and scores {list(score.shape)}")
        return people, 0.0
    except _DAMAGED as error:
        raise DataError(f"not a readable pickle of keypoints ({error})", where=str(path), fix=FIX) from error
