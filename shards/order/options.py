"""What decides the order besides the index: sources, options, and the identity a data state refers to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from shards.errors import DataError
from shards.format.index import ShardSet
from shards.format.text_columns import TextColumn, open_column, with_texts
from shards.order.mix import Schedule, Weight, as_schedule
from shards.order.shuffle import Ints

PlanKind = Literal["pack", "clip", "group", "sequence"]
ORDER_VERSION = 2
"""Raised when the same options would give another order; part of the fingerprint."""

_NEEDED: dict[str, tuple[str, ...]] = {
    "pack": ("block_tokens",),
    "clip": (),
    "group": ("frame_budget",),
    "sequence": ("block_tokens", "frames_per_token"),
}
_NOT_NEGATIVE = ("seed", "length_window", "unique_texts_window", "max_frames", "prompt_tokens", "epoch_samples")
_SHOWN_CHARACTERS = 300  # a data state stays below 1 KB


@dataclass(frozen=True)
class Source:
    """One shard set (or a part of it) and how often an epoch shows it."""

    shard_set: ShardSet
    split: str = "train"
    corpus: str | None = None
    """Only samples of this corpus; None = all."""
    weight: Weight = 1.0
    """Passes per epoch (2.0 shows every sample twice, 0.5 half of them), or the proportion of an epoch when
    ``epoch_samples`` is set. A schedule is (epoch, weight) points, linear between them and constant outside; 0 leaves
    the source out."""
    columns: tuple[str, ...] = ()
    """Text columns of the shard set that the run reads (:mod:`shards.format.text_columns`): their content is part of
    the order's identity, so that a changed one is noticed."""
    text: str = ""
    """Text column whose first text is the text of each sample; samples without one are left out. Empty = the index's
    texts."""

    @cached_property
    def text_columns(self) -> dict[str, TextColumn]:
        """The opened ``columns`` by name, and that of ``text``. Raises DataError for one that is missing or does not
        belong to the set."""
        names = dict.fromkeys((*self.columns, *([self.text] if self.text else [])))
        return {name: open_column(self.shard_set, name) for name in names}

    @cached_property
    def texted(self) -> ShardSet:
        """The shard set with the texts of the run."""
        return with_texts(self.shard_set, self.text_columns[self.text]) if self.text else self.shard_set

    @property
    def schedule(self) -> Schedule:
        """The weight as points. Raises DataError for an impossible one."""
        try:
            return as_schedule(self.weight)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"weight of {self.shard_set.dir} {error}", where="plan options", fix="correct the data section"
            ) from error

    def named_weight(self) -> str:
        """The weight in one word: ``1``, or ``0:1,3:0.2``."""
        schedule = self.schedule
        return f"{schedule[0][1]:g}" if len(schedule) == 1 else ",".join(f"{e}:{w:g}" for e, w in schedule)


@dataclass(frozen=True)
class PlanOptions:
    """Everything besides the index that decides the order; all of it is part of the fingerprint."""

    kind: PlanKind
    seed: int = 0
    block_tokens: int = 0
    """pack, sequence: tokens per item."""
    frame_budget: int | None = None
    """group: frames per item, padding included."""
    length_window: int = 0
    """clip, group: sort by length inside windows of this many clips; 0 = off."""
    unique_texts_window: int = 0
    """clip, group: no text twice among this many consecutive items (the global batch); 0 = off."""
    shuffle: bool = True
    max_frames: int = 0
    """clip, group, sequence: longer clips are subsampled evenly to this many frames; 0 = no limit."""
    frame_stride: int = 1
    """clip, group, sequence: keep every n-th stored frame."""
    epoch_samples: int = 0
    """Samples per epoch, weights being proportions of it; 0 = an epoch is every source's weight in passes."""
    frames_per_token: int = 0
    """sequence: frames that become one token for the language model."""
    prompt_tokens: int = 0
    """sequence: tokens every sample has besides its frames and its text."""
    tokenizer: str = ""
    """sequence: fingerprint of the tokenizer that counted the text tokens."""
    slowest: float = 1.0
    """clip, group, sequence: the lowest speed at which a clip may be shown. Below 1 it may have more frames, for which
    there must be room, though never more than ``max_frames``."""
    drop_longer: bool = False
    """sequence: leave out samples longer than ``block_tokens``, counted in the stats; else they are an error."""

    def lengths(self, columns: Mapping[str, Any]) -> Ints:
        """Tokens or frames a sample occupies in an item.

        Args:
            columns: ``frames`` and ``tokens`` of the samples, arrays of any integer type.
        """
        if self.kind == "pack":
            return np.asarray(columns["tokens"], dtype=np.int64)
        kept = self.most_frames(np.asarray(columns["frames"], dtype=np.int64))
        if self.kind != "sequence":
            return kept
        return self.visual_tokens(kept) + np.asarray(columns["tokens"], dtype=np.int64) + self.prompt_tokens

    def most_frames(self, frames: Any) -> Ints:
        """clip, group, sequence: frames that clips of so many stored ones deliver at most."""
        if self.slowest == 1.0:
            kept: Ints = kept_frames(frames, self.max_frames, self.frame_stride)
            return kept
        slowed = np.ceil(kept_frames(frames, 0, self.frame_stride) / self.slowest).astype(np.int64)
        return np.asarray(kept_frames(slowed, self.max_frames, 1))

    def visual_tokens(self, kept: Any) -> Any:
        """sequence: tokens that a clip's kept frames become, an incomplete last one included."""
        return -(-kept // self.frames_per_token)


def kept_frames(frames: Any, max_frames: int, frame_stride: int) -> Any:
    """Frames a clip delivers when every ``frame_stride``-th is kept, at most ``max_frames`` (0 = no limit)."""
    kept = -(-frames // frame_stride)
    return np.minimum(kept, max_frames) if max_frames else kept


def check_options(options: PlanOptions, sources: Sequence[Source], counted: bool = False) -> None:
    """Raises DataError naming every option that is out of range, or the shard set that does not fit the kind.

    ``counted``: the plan's text tokens are not those of the index.
    """
    needed = (*_NEEDED[options.kind], "frame_stride")
    problems = [
        f"{name} must be positive for kind {options.kind!r}, it is {getattr(options, name)}"
        for name in needed
        if (getattr(options, name) or 0) <= 0
    ]
    problems += [
        f"{name} must not be negative, it is {getattr(options, name)}"
        for name in _NOT_NEGATIVE
        if getattr(options, name) < 0
    ]
    if options.kind in ("pack", "sequence") and options.unique_texts_window:
        problems.append(f"unique_texts_window has no meaning for kind {options.kind!r}: packs mix many texts")
    if not 0 < options.slowest <= 1:
        problems.append(f"slowest must be above 0 and at most 1, it is {options.slowest}")
    problems += [] if sources else ["no source is given"]
    if problems:
        raise DataError("; ".join(problems), where="plan options", fix="correct the data section")
    for source in sources:
        _check_kind(source.shard_set, options)
        if options.kind == "sequence" and not counted:
            _check_tokenizer(source.shard_set, options)
    kinds = {source.shard_set.manifest.kind: str(source.shard_set.dir) for source in sources}
    if len(kinds) > 1:
        raise DataError(
            f"videos and stored features in one plan: {kinds}",
            where="plan options",
            fix="extract features of all sources (`slt shards features`), or train on the videos of all",
        )


def _check_kind(shard_set: ShardSet, options: PlanOptions) -> None:
    wanted = ("text",) if options.kind == "pack" else ("video", "features")
    manifest = shard_set.manifest
    if manifest.kind not in wanted:
        raise DataError(
            f"a plan of {options.kind}s needs {' or '.join(wanted)} shards, these hold {manifest.kind}",
            where=str(shard_set.dir),
            fix=f"name a {wanted[0]} shard set under data.train / data.eval",
        )


def _check_tokenizer(shard_set: ShardSet, options: PlanOptions) -> None:
    counted_by = shard_set.manifest.options.get("text_tokenizer")
    if not counted_by or counted_by != options.tokenizer:
        raise DataError(
            f"the text tokens in the index were counted by tokenizer {counted_by or 'none'}, "
            f"the plan needs {options.tokenizer or 'one'}",
            where=str(shard_set.dir),
            fix="build the shard set with --tokenizer naming the tokenizer of the language model",
        )


def identity(sources: Sequence[Source], options: PlanOptions) -> dict[str, Any]:
    """What the order depends on, readable: the options that are not at their default, and per source its content,
    selection and weight (shortened when there are many)."""
    read = [{name: column.fingerprint for name, column in source.text_columns.items()} for source in sources]
    parts = [
        f"{source.shard_set.fingerprint[:16]} {source.split}/{source.corpus or '*'} x{source.named_weight()}"
        + "".join(f" +{name}:{of[:8]}" for name, of in columns.items())
        + (f" text={source.text}" if source.text else "")
        for source, columns in zip(sources, read, strict=True)
    ]
    exact = [
        [
            source.shard_set.fingerprint,
            source.split,
            source.corpus,
            repr(source.schedule),
            *([columns] if columns else []),
            *([source.text] if source.text else []),
        ]
        for source, columns in zip(sources, read, strict=True)
    ]
    digest = hashlib.sha256(json.dumps(exact).encode()).hexdigest()[:16]
    shown = parts if sum(map(len, parts)) <= _SHOWN_CHARACTERS else [f"{len(parts)} sources"]
    values = {**_defaults(), **dataclasses.asdict(options)}
    changed = {name: value for name, value in values.items() if value != _defaults().get(name) or name == "seed"}
    return {"order_version": ORDER_VERSION, **changed, "sources": shown, "sources_digest": digest}


def fingerprint(about: Mapping[str, Any]) -> str:
    """32 hex digits of an identity: 8 for the options, 8 for the seed, 16 for the sources."""
    sources = {name: about[name] for name in ("sources", "sources_digest")}
    options = {name: value for name, value in about.items() if name != "seed" and name not in sources}

    def digest(value: Any, digits: int) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]

    return digest(options, 8) + digest(about["seed"], 8) + digest(sources, 16)


def differing_parts(theirs: str, ours: str) -> list[str]:
    """Which parts of two fingerprints differ."""
    parts = {
        "plan options or version of the order": slice(0, 8),
        "seed": slice(8, 16),
        "shards, split, corpus, weight or text columns": slice(16, 32),
    }
    different = [name for name, part in parts.items() if theirs[part] != ours[part]]
    return [f"different {', '.join(different)} (fingerprint was {theirs}, is {ours})"]


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """``name: was X, is Y`` for every entry that differs; the digest only when nothing else says why."""
    if theirs.get("order_version") != ours["order_version"]:  # then the same options mean something else
        return [f"order_version: was {theirs.get('order_version')!r}, is {ours['order_version']!r}"]
    was, now = ({**_defaults(), **values} for values in (theirs, ours))
    changes = [f"{name}: was {was.get(name)!r}, is {now[name]!r}" for name in now if was.get(name) != now[name]]
    readable = [text for text in changes if not text.startswith("sources_digest")]
    return readable or changes


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(PlanOptions) if field.name != "kind"}
