"""Rules about a shard set as a whole: index against manifest, samples that occur twice, splits that share content."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.filter.shared_texts import shared_with_train
from shards.format.index import INDEX_NAME, ShardSet, fingerprint
from shards.format.verify import Problem
from shards.inspect.lint_text import quoted


def set_problems(shard_set: ShardSet, files: Iterable[str]) -> list[Problem]:
    """Problems that only show when all samples are compared.

    Args:
        shard_set: opened with all columns.
        files: names of the files in the folder.
    """
    problems = [*_manifest_problems(shard_set, files), *_repeated_ids(shard_set.table)]
    if shard_set.manifest.kind != "text":
        problems += _repeated_videos(shard_set.table)
        problems += _texts_in_train(shard_set.table)
    return problems


def _manifest_problems(shard_set: ShardSet, files: Iterable[str]) -> Iterator[Problem]:
    table, manifest = shard_set.table, shard_set.manifest
    if fingerprint(manifest.shards, table) != manifest.fingerprint:
        yield Problem(INDEX_NAME, "", "fingerprint", "its values are not those the manifest was written for")
    splits = dict(collections.Counter(table.column("split").to_pylist()))
    if splits != manifest.splits:
        yield Problem(INDEX_NAME, "", "splits", f"{splits}, the manifest says {manifest.splits}")
    listed = {entry["name"] for entry in manifest.shards}
    for name in sorted(set(table.column("shard").unique().to_pylist()) - listed):
        yield Problem(name, "", "unlisted_shard", "in the index but not in the manifest")
    for name in sorted(files):
        if name.endswith(".tar") and name not in listed:
            yield Problem(name, "", "unlisted_shard", "in the folder but not in the manifest")


def _repeated_ids(table: pa.Table) -> Iterator[Problem]:
    counts = table.group_by(["corpus", "sample_id"]).aggregate([([], "count_all")])
    for row in counts.filter(pc.greater(counts.column("count_all"), 1)).to_pylist():
        detail = f"{row['sample_id']!r} of {row['corpus']} occurs {row['count_all']} times"
        yield Problem(INDEX_NAME, "", "duplicate_id", detail)


def _repeated_videos(table: pa.Table) -> Iterator[Problem]:
    """Samples whose stored bytes (CRC-32 and size) are those of an earlier sample."""
    crc = table.column("crc32").to_numpy().astype(np.uint64)
    identity = crc << np.uint64(32) | table.column("size").to_numpy().astype(np.uint64) & np.uint64(0xFFFFFFFF)
    _, first, inverse, counts = np.unique(identity, return_index=True, return_inverse=True, return_counts=True)
    repeats = np.flatnonzero(counts[inverse] > 1)
    repeats = repeats[first[inverse[repeats]] != repeats]
    names = ("shard", "key", "split")
    again = table.select(names).take(pa.array(repeats)).to_pylist()
    originals = table.select(names).take(pa.array(first[inverse[repeats]])).to_pylist()
    for row, original in zip(again, originals, strict=True):
        same = row["split"] == original["split"]
        rule = "duplicate_video" if same else "video_in_two_splits"
        of_split = "" if same else f" of {original['split']}"
        detail = f"same bytes as {original['shard']}:{original['key']}{of_split}"
        yield Problem(row["shard"], row["key"], rule, detail)


def _texts_in_train(table: pa.Table) -> Iterator[Problem]:
    """Samples of other splits whose text also occurs in train: their scores measure memory."""
    shared = shared_with_train(table)
    if shared is None:
        return
    for row in table.filter(pa.array(shared)).select(["shard", "key", "split", "text"]).to_pylist():
        yield Problem(row["shard"], row["key"], "text_in_train", f"{row['split']}: {quoted(row['text'])}")
