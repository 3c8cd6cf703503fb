"""Reads MosaicML's MDS shards: ``index.json`` and, per shard, sample offsets before the samples.

A shard is: uint32 number of samples, uint32 offset of every sample and of the end, the writer's settings as JSON, the
samples. A sample is: uint32 size of every column without a fixed one, then the columns. Whole shards may be compressed.
"""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.errors import DataError

_FIX = "copy the MDS folder again"
_TEXTS = ("str", "str_int", "str_float", "str_decimal")
_BYTES = ("bytes", "jpeg", "png")
_NUMBERS = {
    **{f"{kind}{bits}": f"<{kind[0]}{bits // 8}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    "int": "<i8",
}
_ARROW_CODECS = {"zstd": "zstd", "br": "brotli", "snappy": "snappy"}


@dataclass(frozen=True, slots=True)
class MdsSample:
    """One sample: texts and numbers as strings, binary columns as bytes; other encodings (pickles!) are left out."""

    where: str
    texts: dict[str, str]
    binary: dict[str, bytes]


def read_mds(folder: Path) -> Iterator[MdsSample]:
    """Every sample of an MDS folder in order. Raises DataError naming shard and sample for anything malformed."""
    path = folder / "index.json"
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
    except FileNotFoundError:
        raise DataError(
            "no index.json: not an MDS folder", where=str(folder), fix="name the folder of the shards"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"unreadable MDS index ({type(error).__name__}: {error})", where=str(path), fix=_FIX) from None
    for info in shards:
        name = _text(info, ("raw_data", "basename"), path)
        if info.get("format") != "mds":
            raise DataError(
                f"the format is {info.get('format')!r}, expected mds",
                where=f"{path}: {name}",
                fix="write the set with MDSWriter",
            )
        try:
            yield from _samples(folder, name, info)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"malformed MDS shard ({type(error).__name__}: {error})", where=str(folder / name), fix=_FIX
            ) from None


def _text(info: Any, keys: tuple[str, ...], path: Path) -> str:
    value = info
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str) or not value or Path(value).is_absolute() or ".." in Path(value).parts:
        raise DataError(f"the file name {'.'.join(keys)} is {value!r}", where=str(path), fix=_FIX)
    return value


def _samples(folder: Path, name: str, info: dict[str, Any]) -> Iterator[MdsSample]:
    data = _shard(folder, name, info)
    count = int(np.frombuffer(data, "<u4", 1)[0])
    if count != info["samples"]:
        raise ValueError(f"{count} samples, the index says {info['samples']}")
    offsets = np.frombuffer(data, "<u4", count + 1, offset=4).astype(np.int64)
    if (np.diff(offsets) < 0).any() or offsets[-1] > len(data):
        raise ValueError("sample offsets reach past the end of the file")
    columns = list(zip(info["column_names"], info["column_encodings"], info["column_sizes"], strict=True))
    for number in range(count):
        yield _sample(data[offsets[number] : offsets[number + 1]], columns, f"{name}:{number}")


def _sample(data: bytes, columns: list[tuple[str, str, int | None]], where: str) -> MdsSample:
    variable = sum(size is None for _, _, size in columns)
    sizes = iter(np.frombuffer(data, "<u4", variable).tolist())
    place = 4 * variable
    sample = MdsSample(where, {}, {})
    for name, encoding, fixed in columns:
        size = next(sizes) if fixed is None else fixed
        value = data[place : place + size]
        if len(value) != size:
            raise ValueError(f"column {name} of sample {where} is cut off")
        place += size
        kind = encoding.partition(":")[0]
        if kind in _TEXTS:
            sample.texts[name] = value.decode("utf-8")
        elif kind == "json":
            parsed = json.loads(value)
            sample.texts[name] = parsed if isinstance(parsed, str) else json.dumps(parsed, ensure_ascii=False)
        elif kind in _NUMBERS:
            sample.texts[name] = str(np.frombuffer(value, _NUMBERS[kind], 1)[0])
        elif kind in _BYTES:
            sample.binary[name] = value
    return sample


def _shard(folder: Path, name: str, info: dict[str, Any]) -> bytes:
    """The raw bytes of a shard, decompressed if only the compressed file exists."""
    raw = folder / name
    try:
        if raw.is_file():
            data = raw.read_bytes()
        elif info.get("zip_data"):
            packed = folder / _text(info, ("zip_data", "basename"), folder)
            data = _unpack(packed.read_bytes(), str(info.get("compression")), info["raw_data"]["bytes"], packed)
        else:
            raise DataError("the MDS shard is missing", where=str(raw), fix=_FIX)
    except OSError as error:
        raise DataError(f"cannot read the MDS shard ({error})", where=str(raw), fix=_FIX) from error
    if len(data) != info["raw_data"]["bytes"]:
        raise ValueError(f"{len(data)} bytes, the index says {info['raw_data']['bytes']}")
    return data


def _unpack(data: bytes, compression: str, size: int, path: Path) -> bytes:
    codec = compression.partition(":")[0]
    if codec == "gz":
        return gzip.decompress(data)
    if codec == "bz2":
        return bz2.decompress(data)
    if codec not in _ARROW_CODECS:
        raise DataError(f"unknown compression {compression!r}", where=str(path), fix="write the MDS set uncompressed")
    return bytes(pa.decompress(data, size, _ARROW_CODECS[codec], asbytes=True))
