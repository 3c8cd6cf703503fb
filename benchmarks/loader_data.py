"""The shard sets that the loader benchmarks read: written by this project, plain WebDataset tars for everybody."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from shards.format.index import fingerprint, rows_to_table, write_index
from shards.format.writer import TarWriter, add_documents, add_video
from shards.media.video import VideoInfo
from shards.schema import IndexRow, Kind, Manifest, Segment, text_hash

CLIPS_PER_SHARD, BLOCKS_PER_SHARD, DOCUMENTS_PER_SHARD, DOCUMENTS_PER_MEMBER = 200, 2500, 16_384, 256
Add = Callable[[TarWriter, range], list[IndexRow]]


def make_clips(folder: Path, count: int) -> Path:
    """Clips of 200 +- 40 KB of random bytes with their json."""
    random = np.random.default_rng(0)
    info = VideoInfo(100, 25.0, 256, 256, 4.0, "h264")

    def add(tar: TarWriter, numbers: range) -> list[IndexRow]:
        sizes = np.clip(random.normal(200_000, 40_000, len(numbers)), 20_000, None).astype(int)
        return [
            add_video(tar, _segment(number), random.bytes(int(size)), info)
            for number, size in zip(numbers, sizes, strict=True)
        ]

    return _write(folder, "video", count, CLIPS_PER_SHARD, add)


def make_blocks(folder: Path, count: int, tokens: int = 2048) -> Path:
    """Blocks of tokens, one ``.npy`` member each and nothing else: the smallest tar that plain programs can read."""
    random = np.random.default_rng(0)

    def add(tar: TarWriter, numbers: range) -> list[IndexRow]:
        return [
            _npy_row(tar, number, random.integers(0, 60_000, tokens).astype("<u2"), {"tokens": tokens})
            for number in numbers
        ]

    return _write(folder, "text", count, BLOCKS_PER_SHARD, add)


def make_documents(folder: Path, count: int) -> Path:
    """Sentences of 28 +- 12 tokens, as subtitle corpora have them, 256 per member as this project stores text."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.normal(28, 12, count), 3, 200).astype(int)

    def add(tar: TarWriter, numbers: range) -> list[IndexRow]:
        rows: list[IndexRow] = []
        for first in range(numbers.start, numbers.stop, DOCUMENTS_PER_MEMBER):
            part = range(first, min(first + DOCUMENTS_PER_MEMBER, numbers.stop))
            tokens = [random.integers(0, 60_000, lengths[number]).astype("<u2") for number in part]
            rows += add_documents(tar, f"{first:08d}", [_segment(number) for number in part], tokens)
        return rows

    return _write(folder, "text", count, DOCUMENTS_PER_SHARD, add)


def make_features(folder: Path, count: int, width: int = 768) -> Path:
    """Clips of 120 +- 40 frames as float16 features of a width, one ``.npy`` member each."""
    random = np.random.default_rng(0)
    noise = random.standard_normal((200, width)).astype("<f2")

    def add(tar: TarWriter, numbers: range) -> list[IndexRow]:
        frames = np.clip(random.normal(120, 40, len(numbers)), 20, 200).astype(int).tolist()
        return [
            _npy_row(tar, number, noise[:length], {"frames": length, "width": width, "height": 1, "fps": 25.0})
            for number, length in zip(numbers, frames, strict=True)
        ]

    return _write(folder, "features", count, CLIPS_PER_SHARD, add)


def make_videos(folder: Path, payloads: list[bytes], frames: int, count: int) -> Path:
    """Clips that are real videos: these payloads in turn, ``frames`` each."""
    info = VideoInfo(frames, 25.0, 256, 256, frames / 25, "h264")

    def add(tar: TarWriter, numbers: range) -> list[IndexRow]:
        return [add_video(tar, _segment(number), payloads[number % len(payloads)], info) for number in numbers]

    return _write(folder, "video", count, CLIPS_PER_SHARD, add)


def _segment(number: int) -> Segment:
    return Segment("bench", f"{number:08d}", "train", f"ein kurzer satz mit der nummer {number}", language="de")


def _npy_row(tar: TarWriter, number: int, array: np.ndarray, more: dict[str, Any]) -> IndexRow:
    """One member without json, and its row."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    payload = buffer.getvalue()
    written = tar.add(f"{number:08d}.npy", payload)
    data, text = array.tobytes(), f"block {number}"
    values: dict[str, Any] = {name: kind() for name, kind in get_type_hints(IndexRow).items()}
    values |= {"shard": tar.path.name, "key": f"{number:08d}", "sample_id": f"{number:08d}", "split": "train"}
    values |= {"corpus": "bench", "text": text, "text_hash": text_hash(text), "meta_offset": -1, **more}
    values |= {"offset": written.offset + len(payload) - len(data), "size": len(data), "crc32": zlib.crc32(data)}
    return IndexRow(**values)


def _write(folder: Path, kind: Kind, count: int, per_shard: int, add: Add) -> Path:
    folder.mkdir(parents=True)
    rows: list[IndexRow] = []
    shards: list[dict[str, Any]] = []
    for first in range(0, count, per_shard):
        with TarWriter(folder / f"train-{len(shards):06d}.tar") as tar:
            made = add(tar, range(first, min(first + per_shard, count)))
        rows += made
        shards.append({"name": tar.path.name, "samples": len(made), "size": tar.size, "sha256": tar.digest.hexdigest()})
    table = rows_to_table(rows)
    write_index(
        folder, table, Manifest(kind, shards=shards, splits={"train": count}, fingerprint=fingerprint(shards, table))
    )
    return folder
