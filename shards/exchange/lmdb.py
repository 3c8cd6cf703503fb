"""Reads LMDB frame stores as sign language projects write them.

Three layouts, distinguished by keys and values: ``train/NAME/000012`` -> one encoded image; a database per video
with keys ``0``, ``1``, ...; and ``NAME`` -> a pickled list of encoded images, a pickled uint8 array, or a video file.
The unpickler reads lists, bytes and NumPy arrays and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import DataError

_IMAGES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png"}
_METADATA_KEYS = frozenset(("details", "__keys__", "__len__", "keys", "length", "num_samples", "meta", "metadata"))
_ARRAY_PARTS = frozenset(
    {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }
)
_FIX = "store frames as encoded images under NAME/NUMBER, or as a pickled list of them under NAME"


def image_suffix(data: bytes) -> str:
    """``jpg`` or ``png`` by the first bytes; '' for anything else."""
    return next((suffix for magic, suffix in _IMAGES.items() if data.startswith(magic)), "")


def is_video(data: bytes) -> bool:
    """Whether these are the first bytes of an mp4, webm, mkv or avi file."""
    return data[4:8] == b"ftyp" or data[:4] == b"\x1a\x45\xdf\xa3" or (data[:4] == b"RIFF" and data[8:11] == b"AVI")


def read_lmdb(path: Path) -> Iterator[tuple[str, str, bytes | list[bytes]]]:
    """(name, where, video bytes or encoded frames in order) of every video.

    Args:
        path: an LMDB file or folder, or a folder that holds one LMDB folder per video.

    Raises:
        DataError: nothing there, a damaged database, or values of another kind, naming the key.
    """
    if path.is_file() or (path / "data.mdb").is_file():
        yield from _database(path, path.stem)
        return
    folders = sorted(file.parent for file in path.rglob("data.mdb"))
    if not folders:
        raise DataError("no LMDB database here", where=str(path), fix="name the folder that holds data.mdb")
    for folder in folders:
        yield from _database(folder, folder.relative_to(path).as_posix())


def _database(path: Path, name: str) -> Iterator[tuple[str, str, bytes | list[bytes]]]:
    try:
        import lmdb
    except ImportError:
        raise DataError("needs the package lmdb", where=str(path), fix="pip install 'llava-slt[lmdb]'") from None
    try:
        with (
            lmdb.open(str(path), readonly=True, lock=False, readahead=False, subdir=path.is_dir()) as database,
            database.begin(buffers=False) as transaction,
        ):
            for video, keys in _videos(transaction, name, path).items():
                yield video, f"{path}:{video}", _media(transaction, keys, f"{path}:{video}")
    except lmdb.Error as error:
        raise DataError(f"damaged LMDB database ({error})", where=str(path), fix="copy it again") from error


def _videos(transaction: Any, name: str, path: Path) -> dict[str, list[bytes]]:
    """Keys of every video, frames in playing order."""
    groups: dict[str, list[tuple[tuple[Any, ...], bytes]]] = {}
    for key in transaction.cursor().iternext(keys=True, values=False):
        try:
            text = key.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"the key {key[:40]!r} is no text", where=str(path), fix=_FIX) from None
        if text in _METADATA_KEYS:
            continue
        parent, frame = _split_key(text, name)
        groups.setdefault(parent, []).append((_natural(frame), key))
    return {parent: [key for _, key in sorted(frames)] for parent, frames in sorted(groups.items())}


def _split_key(text: str, name: str) -> tuple[str, str]:
    """(video, frame) of a key; the frame is empty if the key names a whole video."""
    stem = re.sub(r"\.(?:jpe?g|png)$", "", text)
    if stem.isdigit():
        return name, stem
    match = re.fullmatch(r"(.+?)[/_]?(?:images?|img|frame)?[_]?(\d+)", stem.rpartition("/")[2])
    if "/" in stem and (stem.rpartition("/")[2].isdigit() or match):
        return stem.rpartition("/")[0], stem.rpartition("/")[2]
    return text, ""


def _natural(text: str) -> tuple[Any, ...]:
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", text) if part)


def _media(transaction: Any, keys: list[bytes], where: str) -> bytes | list[bytes]:
    first = transaction.get(keys[0])
    if image_suffix(first):
        values = [transaction.get(key) for key in keys]
        if broken := [key for key, value in zip(keys, values, strict=True) if not image_suffix(value)]:
            raise DataError(f"the value of {broken[0].decode()!r} is no image", where=where, fix=_FIX)
        return values
    if len(keys) == 1 and is_video(first):
        return bytes(first)
    if len(keys) == 1 and first[:1] == b"\x80":
        return _frames(_unpickle(first, where), where)
    raise DataError(f"the value of {keys[0].decode()!r} is no image, video or list of images", where=where, fix=_FIX)


class _Frames(pickle.Unpickler):
    """Lists, tuples, bytes and NumPy arrays; a pickle that names anything else is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}")
        return super().find_class(module, name)


def _unpickle(data: bytes, where: str) -> Any:
    try:
        return _Frames(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(
            f"the pickle is refused or damaged ({type(error).__name__}: {error})", where=where, fix=_FIX
        ) from None


def _frames(value: object, where: str) -> list[bytes]:
    """Encoded images of an unpickled value; raw pixels become PNG."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 4 and value.shape[-1] == 3:
        return [_png(picture) for picture in value]
    if isinstance(value, list | tuple) and value:
        frames = [item.tobytes() if isinstance(item, np.ndarray) and item.ndim == 1 else item for item in value]
        if all(isinstance(frame, bytes) and image_suffix(frame) for frame in frames):
            return frames
        if all(isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 for frame in frames):
            return [_png(frame) for frame in frames]
    raise DataError(f"a pickled {type(value).__name__} that holds no images", where=where, fix=_FIX)


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
