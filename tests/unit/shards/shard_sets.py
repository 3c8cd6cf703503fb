"""Small shard sets for the tests of the reading side: in memory for plans, on disk for readers and loaders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards.format.index import ShardSet, fingerprint, rows_to_table, write_index
from shards.format.writer import TarWriter, add_documents, add_video
from shards.load.reader import Reader
from shards.media.video import VideoInfo
from shards.order.items import Elements
from shards.schema import IndexRow, Kind, Manifest, Segment


def in_memory(kind: Kind, lengths: Sequence[int], name: str = "set", **columns: Sequence[Any]) -> ShardSet:
    """A shard set without bytes; ``columns`` override single IndexRow fields sample by sample."""
    rows = []
    for number, length in enumerate(lengths):
        values: dict[str, Any] = {
            "shard": f"train-{number // 100:06d}.tar", "key": f"{name}{number}", "offset": 512 * number,
            "size": 2 * length, "crc32": 0, "meta_offset": -1, "meta_size": 0, "meta_crc32": 0, "split": "train",
            "corpus": name, "sample_id": f"{name}{number}", "text": f"text {number}", "text_hash": number,
            "language": "de", "sign_language": "gsg", "signer": "", "gloss": "", "frames": 0, "fps": 25.0,
            "duration_seconds": 0.0, "width": 64, "height": 64, "tokens": 0,
        }  # fmt: skip
        values["tokens" if kind == "text" else "frames"] = length
        values |= {column: options[number] for column, options in columns.items()}
        rows.append(IndexRow(**values))
    return ShardSet(Path("/nowhere") / name, _manifest(kind, rows, []), rows_to_table(rows))


def _manifest(kind: Kind, rows: list[IndexRow], shards: list[dict[str, Any]]) -> Manifest:
    splits = {split: sum(row.split == split for row in rows) for split in {row.split for row in rows}}
    return Manifest(kind=kind, splits=splits, shards=shards, fingerprint=fingerprint(shards, rows_to_table(rows)))


def write_videos(folder: Path, payloads: Sequence[bytes], frames: Sequence[int], per_shard: int = 10) -> Path:
    """A video shard set on disk; the payloads need not be videos when nothing decodes them."""
    folder.mkdir(parents=True)
    rows: list[IndexRow] = []
    shards: list[dict[str, Any]] = []
    for first in range(0, len(payloads), per_shard):
        with TarWriter(folder / f"train-{len(shards):06d}.tar") as tar:
            made = [
                add_video(tar, _segment(n), payloads[n], VideoInfo(frames[n], 25.0, 64, 64, frames[n] / 25, "h264"))
                for n in range(first, min(first + per_shard, len(payloads)))
            ]
        rows += made
        shards.append(_shard(tar, len(made)))
    write_index(folder, rows_to_table(rows), _manifest("video", rows, shards))
    return folder


def write_texts(folder: Path, documents: Sequence[np.ndarray], per_member: int = 16, per_shard: int = 64) -> Path:
    """A text shard set on disk."""
    folder.mkdir(parents=True)
    rows: list[IndexRow] = []
    shards: list[dict[str, Any]] = []
    for first in range(0, len(documents), per_shard):
        made: list[IndexRow] = []
        last = min(first + per_shard, len(documents))
        with TarWriter(folder / f"train-{len(shards):06d}.tar") as tar:
            for start in range(first, last, per_member):
                part = range(start, min(start + per_member, last))
                segments, tokens = [_segment(n) for n in part], [documents[n] for n in part]
                made += add_documents(tar, f"docs-{start:06d}", segments, tokens)
        rows += made
        shards.append(_shard(tar, len(made)))
    write_index(folder, rows_to_table(rows), _manifest("text", rows, shards))
    return folder


def _shard(tar: TarWriter, samples: int) -> dict[str, Any]:
    return {"name": tar.path.name, "samples": samples, "size": tar.size, "sha256": tar.digest.hexdigest()}


def _segment(number: int) -> Segment:
    return Segment("made", f"clip{number:04d}", "train", f"text number {number}", language="de")


def fetch_payload(reader: Reader, item: Elements) -> list[tuple[int, bytes]]:
    """Raw sample = its number and its bytes; at module level, so that workers can import it."""
    return [(int(element["sample"]), bytes(reader.payload(int(element["sample"])))) for element in item]


def fetch_tokens(reader: Reader, item: Elements) -> list[tuple[int, np.ndarray]]:
    """Raw sample = its number and the tokens of the piece."""
    return [(int(element["sample"]), reader.tokens(element)) for element in item]


def fetch_numbers(reader: Reader, item: Elements) -> list[tuple[int, int]]:
    """Raw sample = its number and length; reads nothing."""
    del reader
    return [(int(element["sample"]), int(element["length"])) for element in item]


def collate_lists(items: list[list[Any]]) -> dict[str, Any]:
    """The items as they are."""
    return {"items": items}
