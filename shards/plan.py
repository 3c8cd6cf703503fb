"""The plan: which samples every step reads, as a pure function of (index, options, seed, epoch). No torch, no data.

An *item* is what a batch counts: a pack of documents, a clip, or a group of clips. Epochs follow one another without
a gap, so the state of the data is one :class:`Cursor`, valid at any world size and worker count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards import order, packing
from shards.errors import DataError
from shards.index import ShardSet, read_index
from shards.order import Ints
from shards.packing import Elements, EpochItems
from shards.schema import IndexRow

PlanKind = Literal["pack", "clip", "group"]
ORDER_VERSION = 1
"""Raised when the same options would give another order; part of the fingerprint."""

_KEPT_ELEMENTS = 1 << 16  # a step over a tiny set may span many epochs
_NUMBERS = ("offset", "size", "crc32", "meta_offset", "meta_size", "meta_crc32", "frames", "tokens", "text_hash")


@dataclass(frozen=True)
class Source:
    """One shard set (or a part of it) and how often an epoch shows it."""

    shard_set: ShardSet
    split: str = "train"
    corpus: str | None = None
    """Only samples of this corpus; None = all."""
    weight: float = 1.0
    """Passes per epoch; 2.0 shows every sample twice, 0.5 a seeded half."""


@dataclass(frozen=True)
class PlanOptions:
    """Everything besides the index that decides the order; all of it is part of the fingerprint."""

    kind: PlanKind
    seed: int = 0
    block_tokens: int = 0
    """pack: tokens per item."""
    frame_budget: int | None = None
    """group: frames per item, padding included."""
    length_window: int = 0
    """clip, group: sort by length inside windows of this many clips; 0 = off."""
    unique_texts_window: int = 0
    """clip, group: no text twice among this many consecutive items (the global batch); 0 = off."""
    shuffle: bool = True
    max_frames: int = 0
    """clip, group: longer clips are subsampled evenly to this many frames; 0 = no limit."""
    frame_stride: int = 1
    """clip, group: keep every n-th stored frame."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A position in the plan: the next item of an epoch, and the items consumed since the beginning of the run."""

    epoch: int = 0
    item: int = 0
    consumed: int = 0

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, int]) -> Cursor:
        """Inverse of ``to_dict``. Raises DataError for anything else."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names or any(not isinstance(v, int) or v < 0 for v in values.values()):
            raise DataError(
                f"data cursor {dict(values)!r} is not {sorted(names)} with non-negative integers",
                where="data state",
                fix="resume from an intact checkpoint",
            )
        return cls(**values)


class Plan:
    """The order of all samples of a run.

    Args:
        sources: shard sets and their weights; sample numbers run through them one after another.
        options: how items are made.

    Raises:
        DataError: no sample matches a source, a shard set is of the wrong kind, or an option is out of range.
    """

    def __init__(self, sources: Sequence[Source], options: PlanOptions) -> None:
        _check_options(options, sources)
        tables = [_select(source, options.kind) for source in sources]
        self.sources, self.options = tuple(sources), options
        self.counts = tuple(table.num_rows for table in tables)
        self.n_samples = sum(self.counts)
        self.table = pa.concat_tables(tables)
        """[n_samples] index rows of all sources; never parts of the rows that no source selects."""
        self.columns: dict[str, Ints] = {
            name: self.table.column(name).to_numpy().astype(np.int64, copy=False) for name in _NUMBERS
        }
        self._row_columns = [_by_position(self.table.column(field.name)) for field in dataclasses.fields(IndexRow)]
        self.shards, self.shard_of = _shard_paths(sources, tables)
        """The distinct tars, and [n_samples] the number of each sample's tar."""
        self.lengths = self._lengths()
        """[n_samples] tokens of a document, or frames of a clip after stride and limit."""
        self.identity = _identity(self.sources, options)
        """What the order depends on, readable; a state with another identity belongs to another run."""
        self.fingerprint = _fingerprint(self.identity)
        """32 hex digits: 8 for the options, 8 for the seed, 16 for the sources, so that a mismatch can be named."""
        self._epochs: OrderedDict[int, EpochItems] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process reads the index again: cheaper than a pipe for millions of rows, and it proves equality.
        specs = [(source.shard_set.dir, source.split, source.corpus, source.weight) for source in self.sources]
        return _reopen, (specs, self.options, self.identity)

    def row(self, sample: int) -> IndexRow:
        """The index row of one sample."""
        return IndexRow(
            *(c.item(sample) if isinstance(c, np.ndarray) else c[sample].as_py() for c in self._row_columns)
        )

    def shard_path(self, sample: int) -> Path:
        """The tar that holds a sample."""
        return self.shards[self.shard_of[sample]]

    def corpora(self) -> list[str]:
        """Names of the corpora in the plan, sorted."""
        return sorted(self.table["corpus"].unique().to_pylist())

    @property
    def items_per_epoch(self) -> int:
        """Items of the first epoch; packs and groups of later ones may differ by a few."""
        return len(self.epoch(0))

    def epoch(self, number: int) -> EpochItems:
        """The items of one epoch, in order. The last two epochs asked for are kept, more when they are small."""
        if number not in self._epochs:
            self._epochs[number] = self._make_epoch(number)
            kept = max(2, _KEPT_ELEMENTS // len(self._epochs[number].elements))
            while len(self._epochs) > kept:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(number)
        return self._epochs[number]

    def advance(self, cursor: Cursor, items: int) -> Cursor:
        """The cursor ``items`` further on, across epoch borders. It never points past the last item of an epoch."""
        epoch, item = cursor.epoch, cursor.item + items
        while item >= (size := len(self.epoch(epoch))):
            epoch, item = epoch + 1, item - size
        return Cursor(epoch, item, cursor.consumed + items)

    def items(self, cursor: Cursor, count: int) -> tuple[list[Elements], Cursor]:
        """The next ``count`` items across epoch borders, and the cursor after them."""
        found: list[Elements] = []
        place = self.advance(cursor, 0)
        while len(found) < count:
            epoch = self.epoch(place.epoch)
            stop = min(place.item + count - len(found), len(epoch))
            found += [epoch.item(number) for number in range(place.item, stop)]
            place = self.advance(place, stop - place.item)
        return found, place

    def utilisation(self, epoch: int = 0) -> float:
        """Part of the padded positions of an epoch that hold data (packs: of ``block_tokens``; else of the longest)."""
        items = self.epoch(epoch)
        lengths, sizes = items.elements["length"].astype(np.int64), np.diff(items.starts)
        if self.options.kind == "pack":
            return float(lengths.sum() / (len(items) * self.options.block_tokens))
        return float(lengths.sum() / (np.maximum.reduceat(lengths, items.starts[:-1]) * sizes).sum())

    def stats(self, epoch: int = 0) -> dict[str, float | int]:
        """Counts of an epoch: items, samples (distinct), tokens or frames, utilisation, padding, repeated texts."""
        items = self.epoch(epoch)
        utilisation = self.utilisation(epoch)
        return {
            "items": len(items),
            "samples": len(np.unique(items.elements["sample"])),
            "tokens" if self.options.kind == "pack" else "frames": int(items.elements["length"].sum(dtype=np.int64)),
            "utilisation": utilisation,
            "padding": 1.0 - utilisation,
            "repeated_texts": items.repeated_texts,
        }

    def state(self, cursor: Cursor) -> dict[str, Any]:
        """What a checkpoint keeps of the data: the cursor and what it refers to (< 1 KB)."""
        return {**cursor.to_dict(), "fingerprint": self.fingerprint, "identity": self.identity}

    def restore(self, state: Mapping[str, Any]) -> Cursor:
        """The cursor of a state (``identity`` may be missing). Raises DataError naming what differs from this plan."""
        theirs = str(state.get("fingerprint"))
        if theirs != self.fingerprint:
            named = _differences(state.get("identity") or {}, self.identity) if state.get("identity") else []
            raise DataError(
                "the data state belongs to another order of samples: "
                + "; ".join(named or _differing_parts(theirs, self.fingerprint)),
                where="data state of the checkpoint",
                fix="restore the shards and data options of the original run, or start a new run from its weights",
            )
        return Cursor.from_dict({name: state.get(name, -1) for name in ("epoch", "item", "consumed")})

    def _lengths(self) -> Ints:
        if self.options.kind == "pack":
            return self.columns["tokens"]
        return np.asarray(kept_frames(self.columns["frames"], self.options.max_frames, self.options.frame_stride))

    def _make_epoch(self, number: int) -> EpochItems:
        """Shuffle and mix, then form items, then keep equal texts apart."""
        options, weights = self.options, [source.weight for source in self.sources]
        samples = order.epoch_order(self.counts, weights, options.seed, number, options.shuffle)
        lengths, hashes = self.lengths[samples], self.columns["text_hash"]
        if options.kind == "pack":
            return packing.pack(samples, lengths, options.block_tokens)
        if options.kind == "group":
            texts = hashes[samples] if options.unique_texts_window else None
            assert options.frame_budget is not None  # _check_options
            items, windows = packing.group(samples, lengths, options.frame_budget, options.length_window, texts)
            if options.shuffle:
                items = items.reorder(order.shuffle_groups(windows, options.seed, number), 0)
        else:
            if options.length_window:
                positions = packing.sort_windows(lengths, options.length_window)
                samples, lengths = samples[positions], lengths[positions]
            items = packing.clips(samples, lengths)
        if options.unique_texts_window > 1:
            tags = order.tag_items(items.starts, hashes[items.elements["sample"]])
            items = items.reorder(*order.spread_texts(tags, options.unique_texts_window))
        return items


def kept_frames(frames: Any, max_frames: int, frame_stride: int) -> Any:
    """Frames a clip delivers when every ``frame_stride``-th is kept, at most ``max_frames`` (0 = no limit)."""
    kept = -(-frames // frame_stride)
    return np.minimum(kept, max_frames) if max_frames else kept


def _reopen(specs: list[tuple[Path, str, str | None, float]], options: PlanOptions, identity: dict[str, Any]) -> Plan:
    plan = Plan([Source(read_index(spec[0]), *spec[1:]) for spec in specs], options)
    if differences := _differences(identity, plan.identity):
        raise DataError(
            "the shards changed while the run was reading them: " + "; ".join(differences),
            where=", ".join(str(folder) for folder, *_ in specs),
            fix="never rebuild a shard set in place under a running job; build into a new folder",
        )
    return plan


def _check_options(options: PlanOptions, sources: Sequence[Source]) -> None:
    needed = {"pack": "block_tokens", "group": "frame_budget", "clip": "frame_stride"}[options.kind]
    problems = [] if (getattr(options, needed) or 0) > 0 else [f"{needed} must be positive for kind {options.kind!r}"]
    numbers = ("seed", "length_window", "unique_texts_window", "max_frames")
    problems += [
        f"{name} must not be negative, it is {getattr(options, name)}" for name in numbers if getattr(options, name) < 0
    ]
    problems += [] if options.frame_stride > 0 else [f"frame_stride must be positive, it is {options.frame_stride}"]
    problems += [] if sources else ["no source is given"]
    problems += [
        f"weight of {source.shard_set.dir} must be positive, it is {source.weight}"
        for source in sources
        if not source.weight > 0
    ]
    if problems:
        raise DataError("; ".join(dict.fromkeys(problems)), where="plan options", fix="correct the data section")


def _select(source: Source, kind: PlanKind) -> pa.Table:
    """The index rows of a source."""
    shard_set, wanted = source.shard_set, "text" if kind == "pack" else "video"
    if shard_set.manifest.kind != wanted:
        raise DataError(
            f"a plan of {kind}s needs {wanted} shards, these hold {shard_set.manifest.kind}",
            where=str(shard_set.dir),
            fix=f"name a {wanted} shard set under data.train / data.eval",
        )
    mask = pc.equal(shard_set.table["split"], source.split)
    if source.corpus is not None:
        mask = pc.and_(mask, pc.equal(shard_set.table["corpus"], source.corpus))
    if kind == "pack":
        mask = pc.and_(mask, pc.greater(shard_set.table["tokens"], 0))  # an empty document has nothing to show
    table = shard_set.table.filter(mask)
    if not table.num_rows:
        pairs = shard_set.table.group_by(["split", "corpus"]).aggregate([]).to_pylist()
        names = sorted(f"{pair['split']}/{pair['corpus']}" for pair in pairs)
        raise DataError(
            f"no sample has split {source.split!r} and corpus {source.corpus or 'any'!r}; there are "
            + (", ".join(names[:20]) or "no samples at all"),
            where=str(shard_set.dir),
            fix="name one of these in the data section",
        )
    return table


def _by_position(column: pa.ChunkedArray) -> Any:
    """A column that is fast to index: numbers as NumPy, text as one array unless it is more than 2 GiB."""
    if not pa.types.is_string(column.type):
        return column.to_numpy()
    return pa.concat_arrays(column.chunks) if column.nbytes < 1 << 31 else column


def _shard_paths(sources: Sequence[Source], tables: Sequence[pa.Table]) -> tuple[list[Path], Ints]:
    """The distinct shard paths, and per sample the number of its shard."""
    paths: list[Path] = []
    numbers: list[Ints] = []
    for source, table in zip(sources, tables, strict=True):
        encoded = table["shard"].dictionary_encode().combine_chunks()
        numbers.append(np.asarray(encoded.indices.to_numpy(zero_copy_only=False), dtype=np.int64) + len(paths))
        paths += [source.shard_set.dir / name for name in encoded.dictionary.to_pylist()]
    return paths, np.concatenate(numbers)


def _identity(sources: Sequence[Source], options: PlanOptions) -> dict[str, Any]:
    """The options, and per source its content, selection and weight; shortened when there are many sources."""
    parts = [
        f"{source.shard_set.fingerprint[:16]} {source.split}/{source.corpus or '*'} x{source.weight:g}"
        for source in sources
    ]
    exact = [
        [source.shard_set.fingerprint, source.split, source.corpus, repr(float(source.weight))] for source in sources
    ]
    digest = hashlib.sha256(json.dumps(exact).encode()).hexdigest()[:16]
    shown = parts if sum(map(len, parts)) <= 400 else [f"{len(parts)} sources"]
    return {"order_version": ORDER_VERSION, **dataclasses.asdict(options), "sources": shown, "sources_digest": digest}


def _fingerprint(identity: Mapping[str, Any]) -> str:
    sources = {name: identity[name] for name in ("sources", "sources_digest")}
    options = {name: value for name, value in identity.items() if name != "seed" and name not in sources}

    def digest(value: Any, digits: int) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]

    return digest(options, 8) + digest(identity["seed"], 8) + digest(sources, 16)


def _differing_parts(theirs: str, ours: str) -> list[str]:
    """Which parts of two fingerprints differ."""
    parts = {"plan options": slice(0, 8), "seed": slice(8, 16), "shards, split, corpus or weight": slice(16, 32)}
    found = [name for name, part in parts.items() if theirs[part] != ours[part]]
    return [f"different {', '.join(found)} (fingerprint was {theirs}, is {ours})"]


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """``name: was X, is Y`` for every entry that differs; the digest only when nothing else says why."""
    found = [f"{k}: was {theirs.get(k)!r}, is {ours.get(k)!r}" for k in ours if theirs.get(k) != ours[k]]
    readable = [text for text in found if not text.startswith("sources_digest")]
    return readable or found
