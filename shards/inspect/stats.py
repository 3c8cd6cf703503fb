"""Figures of a shard set, from its index alone, and of a corpus before it is built.

Samples, hours, lengths, vocabulary, signers, sizes, what packing and padding cost, and the overlap of splits.
"""

from __future__ import annotations

import collections
import string
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.filter.shared_texts import TRAIN, counted
from shards.format.index import ShardSet
from shards.format.opening import open_set
from shards.inspect.lint_text import is_unspaced
from shards.names import same_name
from shards.order.packing import best_fit, cut_documents
from shards.storage.store import open_folder

BLOCKS_TOKENS = (512, 1024, 2048, 4096)
BATCHES_CLIPS = (8, 32, 128)
_SAMPLED = 100_000  # utilisation is a mean: more documents change no digit that is shown
_PUNCTUATION = string.punctuation + "«»„“”‚‘’¿¡…–—。，！？、；：（）《》"


def stats(location: Path | str) -> dict[str, Any]:
    """Figures of a shard set, ready for JSON. Raises DataError when it cannot be opened."""
    return describe(open_set(open_folder(location)), str(location))


def describe(shard_set: ShardSet, location: str) -> dict[str, Any]:
    """The figures of an opened set (all columns)."""
    table, manifest = shard_set.table, shard_set.manifest
    texts = all_words(table)
    pairs = table.group_by(["split", "corpus"]).aggregate([]).sort_by([("split", "ascending"), ("corpus", "ascending")])
    return {
        "dir": location,
        "kind": manifest.kind,
        "fingerprint": shard_set.fingerprint,
        "shards": len(manifest.shards),
        "bytes": sum(shard["size"] for shard in manifest.shards),
        "counts": manifest.counts,
        "groups": [_group(table, texts, row["split"], row["corpus"]) for row in pairs.to_pylist()],
        "texts_shared_with_train": counted(manifest.splits, table),
        "vocabulary": _vocabulary(table, texts),
        "signers": _signers(table),
        "frame_rates": _shares(table["fps"].to_numpy()) if manifest.kind != "text" else {},
        "sizes": _sizes(table) if manifest.kind == "video" else {},
        "utilisation": utilisation(lengths(table), manifest.kind),
    }


def words(text: str, language: str = "") -> list[str]:
    """Casefolded words without punctuation; characters for languages without spaces."""
    if is_unspaced(language):
        return [character for character in text.casefold() if character.isalnum()]
    stripped = (word.strip(_PUNCTUATION) for word in text.casefold().split())
    return [word for word in stripped if word]


def lengths(table: pa.Table) -> NDArray[np.int64]:
    """Frames of every video, or tokens of every document."""
    frames: NDArray[np.int64] = table["frames"].to_numpy().astype(np.int64)
    return frames if frames.any() else table["tokens"].to_numpy().astype(np.int64)


def utilisation(samples: NDArray[np.int64], kind: str) -> dict[str, Any]:
    """The part of a batch that is not padding.

    Args:
        samples: tokens of every document, or frames of every clip.
        kind: text: blocks of :data:`BLOCKS_TOKENS`, one document each against best-fit packs. Otherwise batches of
            :data:`BATCHES_CLIPS` padded to their longest clip, in random order against sorted by length.
    """
    generator = np.random.default_rng(0)
    sampled = generator.permutation(samples[samples > 0])[:_SAMPLED]
    rows = []
    for size in BLOCKS_TOKENS if kind == "text" else BATCHES_CLIPS:
        if kind == "text":
            pieces = cut_documents(np.arange(len(sampled)), sampled, size)["length"].astype(np.int64)
            naive = pieces.sum() / (len(pieces) * size) if len(pieces) else 0.0
            best = pieces.sum() / (best_fit(pieces, size)[1] * size) if len(pieces) else 0.0
        else:
            naive, best = _padded(sampled, size), _padded(np.sort(sampled), size)
        rows.append({"size": size, "plain": round(float(naive), 4), "best": round(float(best), 4)})
    if kind == "text":
        return {"unit": "tokens per block", "plain": "one document per block", "best": "packed", "rows": rows}
    return {"unit": "clips per batch", "plain": "random order", "best": "sorted by length", "rows": rows}


def _padded(samples: NDArray[np.int64], batch: int) -> float:
    """Filled part of batches padded to their longest clip; the last batch may be incomplete."""
    starts = np.arange(0, len(samples), batch)
    if not len(starts):
        return 0.0
    longest = np.maximum.reduceat(samples, starts)
    sizes = np.diff([*starts, len(samples)])
    return float(samples.sum() / (longest * sizes).sum())


def _group(table: pa.Table, words_of: list[list[str]], split: str, corpus: str) -> dict[str, Any]:
    chosen = pc.and_(pc.equal(table["split"], split), pc.equal(table["corpus"], corpus))
    rows = table.filter(chosen)
    unit = "frames" if pc.sum(rows["frames"]).as_py() else "tokens"
    texts = [words_of[number] for number in np.flatnonzero(chosen.to_numpy()).tolist()]
    distinct = len(pc.unique(rows["text_hash"]))
    return {
        "split": split,
        "corpus": corpus,
        "samples": rows.num_rows,
        "hours": round(pc.sum(rows["duration_seconds"]).as_py() / 3600, 3),
        "frames": pc.sum(rows["frames"]).as_py(),
        "tokens": pc.sum(rows["tokens"]).as_py(),
        "length": {"unit": unit, **_quantiles(np.asarray(rows[unit]))},
        "seconds": _quantiles(np.asarray(rows["duration_seconds"])),
        "words": {"unit": "words per text", **_quantiles(np.asarray([len(text) for text in texts]))},
        "vocabulary": len({word for text in texts for word in text}),
        "distinct_texts": distinct,
        "repeated_texts": rows.num_rows - distinct,
        "signers": len([name for name in pc.unique(rows["signer"]).to_pylist() if name]),
    }


def all_words(table: pa.Table) -> list[list[str]]:
    """:func:`words` of every sample."""
    return [words(*pair) for pair in zip(table["text"].to_pylist(), table["language"].to_pylist(), strict=True)]


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    low, median, high, most = np.quantile(values, [0.05, 0.5, 0.95, 1.0]).tolist()
    return {"mean": round(float(values.mean()), 2), "p05": low, "p50": median, "p95": high, "max": most}


def word_counts(table: pa.Table, texts: list[list[str]]) -> dict[str, collections.Counter[str]]:
    """How often each word occurs, per split; ``texts`` of :func:`all_words`."""
    counts: dict[str, collections.Counter[str]] = {}
    for split, text in zip(table["split"].to_pylist(), texts, strict=True):
        counts.setdefault(split, collections.Counter()).update(text)
    return counts


def _vocabulary(table: pa.Table, texts: list[list[str]]) -> dict[str, dict[str, Any]]:
    """Per split: words, how many occur once, and how many are not in train (None without a train split)."""
    counts = word_counts(table, texts)
    known = counts.get(TRAIN)
    by_split: dict[str, dict[str, Any]] = {}
    for split in sorted(counts):
        running = counts[split].total()
        unknown = [number for word, number in counts[split].items() if known is None or word not in known]
        part = round(sum(unknown) / running, 4) if running else 0.0
        by_split[split] = {
            "words": running,
            "vocabulary": len(counts[split]),
            "singletons": sum(number == 1 for number in counts[split].values()),
            "unknown_vocabulary": None if known is None else len(unknown),
            "unknown_words_fraction": None if known is None else part,
        }
    return by_split


def _signers(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Per split: samples of each signer, samples without one, and signers not in train (None without train)."""
    by_split: dict[str, dict[str, Any]] = {}
    grouped = table.group_by(["split", "signer"]).aggregate([([], "count_all")]).sort_by("signer").to_pylist()
    for row in grouped:
        entry = by_split.setdefault(row["split"], {"samples": {}, "unnamed": 0, "not_in_train": []})
        if row["signer"]:
            entry["samples"][row["signer"]] = row["count_all"]
        else:
            entry["unnamed"] = row["count_all"]
    seen = {same_name(name) for name in by_split[TRAIN]["samples"]} if TRAIN in by_split else None
    for entry in by_split.values():
        entry["not_in_train"] = None if seen is None else [n for n in entry["samples"] if same_name(n) not in seen]
    return dict(sorted(by_split.items()))


def _shares(values: NDArray[Any]) -> dict[str, int]:
    kinds, numbers = np.unique(np.round(values, 3), return_counts=True)
    return {f"{kind:g}": int(number) for kind, number in zip(kinds, numbers, strict=True)}


def _sizes(table: pa.Table) -> dict[str, int]:
    grouped = table.group_by(["width", "height"]).aggregate([([], "count_all")]).to_pylist()
    grouped.sort(key=lambda row: (-row["count_all"], row["width"], row["height"]))
    return {f"{row['width']}x{row['height']}": row["count_all"] for row in grouped}
