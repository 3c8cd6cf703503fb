"""Figures of a shard set, from its index alone, and of a corpus before it is built.

Samples, hours, lengths, vocabulary, signers, and the overlap of splits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.index import ShardSet, read_index
from shards.prepare import has_media
from shards.schema import Corpus

_COLUMNS = ("split", "corpus", "text", "text_hash", "signer", "frames", "tokens", "duration_seconds", "size", "shard")


def stats(folder: Path | str) -> dict[str, Any]:
    """Per split and corpus figures of a shard set, ready for JSON. Raises DataError when it cannot be opened."""
    shard_set = read_index(folder, _COLUMNS)
    table = shard_set.table
    groups = (
        table.group_by(["split", "corpus"]).aggregate([]).sort_by([("split", "ascending"), ("corpus", "ascending")])
    )
    return {
        "dir": str(folder),
        "kind": shard_set.manifest.kind,
        "fingerprint": shard_set.fingerprint,
        "shards": len(shard_set.manifest.shards),
        "bytes": sum(shard["size"] for shard in shard_set.manifest.shards),
        "counts": shard_set.manifest.counts,
        "groups": [_group(table, row["split"], row["corpus"]) for row in groups.to_pylist()],
        "texts_shared_with_train": _overlap(shard_set),
    }


def segment_counts(corpus: Corpus) -> dict[str, dict[str, int]]:
    """What a corpus yields before anything is built: segments per split, and how many lack text or media."""
    found: dict[str, dict[str, int]] = {}
    for segment in corpus.segments():
        counts = found.setdefault(segment.split, {"segments": 0, "empty_text": 0, "missing_media": 0})
        counts["segments"] += 1
        counts["empty_text"] += not segment.text.strip()
        counts["missing_media"] += segment.media is not None and not has_media(segment.media)
    return found


def _group(table: pa.Table, split: str, corpus: str) -> dict[str, Any]:
    rows = table.filter(pc.and_(pc.equal(table["split"], split), pc.equal(table["corpus"], corpus)))
    length = "frames" if pc.sum(rows["frames"]).as_py() else "tokens"
    lengths = np.asarray(rows[length])
    words = [text.split() for text in rows["text"].to_pylist()]
    return {
        "split": split,
        "corpus": corpus,
        "samples": rows.num_rows,
        "hours": round(pc.sum(rows["duration_seconds"]).as_py() / 3600, 3),
        "frames": pc.sum(rows["frames"]).as_py(),
        "tokens": pc.sum(rows["tokens"]).as_py(),
        "length": {"unit": length, **_quantiles(lengths)},
        "words": {"unit": "words per text", **_quantiles(np.asarray([len(text) for text in words]))},
        "vocabulary": len({word for text in words for word in text}),
        "distinct_texts": len(pc.unique(rows["text_hash"])),
        "signers": len([name for name in pc.unique(rows["signer"]).to_pylist() if name]),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    low, median, high, most = np.quantile(values, [0.05, 0.5, 0.95, 1.0]).tolist()
    return {"mean": round(float(values.mean()), 2), "p05": low, "p50": median, "p95": high, "max": most}


def _overlap(shard_set: ShardSet) -> dict[str, int]:
    """Samples of each other split whose text also occurs in train: their scores measure memory."""
    table = shard_set.table
    train = pc.unique(table.filter(pc.equal(table["split"], "train"))["text_hash"])
    others = [split for split in shard_set.manifest.splits if split != "train"]
    shared = pc.is_in(table["text_hash"], value_set=train)
    return {split: table.filter(pc.and_(pc.equal(table["split"], split), shared)).num_rows for split in others}
