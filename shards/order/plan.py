"""The plan: which samples every step reads, as a pure function of (index, options, seed, epoch). No torch, no data.

An *item* is what a batch counts: a pack of documents, a clip, a group of clips, or a pack of clips with their texts. An
epoch is a sequence of *chunks*, and a chunk can be made on its own, so a plan of any size starts and resumes at once.
Epochs follow one another without a gap: the state of the data is one :class:`Cursor`, valid at any world size and
worker count. docs/data-order.md defines the order exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from shards.errors import DataError
from shards.format.index import open_index
from shards.order import options as plan_options
from shards.order.chunk_cache import ChunkCache
from shards.order.chunks import Chunks, all_lengths
from shards.order.items import Items, joined
from shards.order.mix import Mixture
from shards.order.options import PlanOptions, Source
from shards.order.samples import Choose, Samples
from shards.order.shuffle import Ints

CountTokens = Callable[[Samples], Ints]


class Cursor(NamedTuple):
    """A position in the plan: the next item of a chunk, and the items consumed since the beginning of the run."""

    epoch: int = 0
    chunk: int = 0
    """Number of the chunk in the epoch."""
    item: int = 0
    """Number of the item in the chunk."""
    consumed: int = 0

    def to_dict(self) -> dict[str, int]:
        return self._asdict()

    @classmethod
    def from_dict(cls, values: Mapping[str, int]) -> Cursor:
        """Inverse of ``to_dict``. Raises DataError for anything else."""
        names = list(cls._fields)
        if set(values) != set(names) or any(not isinstance(v, int) or v < 0 for v in values.values()):
            raise DataError(
                f"data cursor {dict(values)!r} is not {names} with non-negative integers",
                where="data state",
                fix="resume from an intact checkpoint",
            )
        return cls(**values)


class Plan:
    """The order of all samples of a run.

    Args:
        sources: shard sets and their weights; sample numbers run through them one after another.
        options: how items are made.
        count: for sequences, the text tokens of every sample; without it they are those of the index.

    Raises:
        DataError: no sample matches a source, a shard set is of the wrong kind, an option or weight is out of range,
            or a sample is longer than a sequence may be.
    """

    def __init__(self, sources: Sequence[Source], options: PlanOptions, count: CountTokens | None = None) -> None:
        plan_options.check_options(options, sources, counted=count is not None)
        self.sources, self.options = tuple(sources), options
        schedules = [source.schedule for source in sources]
        selections = [(source.texted, source.split, source.corpus) for source in sources]
        self.samples = Samples(selections, _choose(options))
        """What the index knows of every sample."""
        self.samples.text_columns = [source.text_columns for source in sources]
        if count is not None:
            self.samples.text_tokens = count(self.samples)
        if options.kind == "sequence" and (count is not None or not options.drop_longer):
            _refuse_longer(self.samples, options)
        self.mixture = Mixture(self.samples.counts, schedules, options.epoch_samples)
        if problem := self.mixture.problem():
            raise DataError(problem, where="plan options", fix="correct the weights or epoch_samples")
        self.chunks = Chunks(self.samples, self.mixture, options)
        self.identity = plan_options.identity(self.sources, options)
        """What the order depends on, readable; a state with another identity belongs to another run."""
        self.fingerprint = plan_options.fingerprint(self.identity)
        """32 hex digits: 8 for the options, 8 for the seed, 16 for the sources, so that a mismatch can be named."""
        self._cache = ChunkCache(self.chunks)
        self._shown = lru_cache(maxsize=4)(self._make_shown)
        self._epoch: tuple[int, Items] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process opens the index again: cheaper than a pipe for millions of rows, and it proves equality.
        specs = [
            (s.shard_set.dir, s.shard_set.cache, s.split, s.corpus, s.weight, s.columns, s.text) for s in self.sources
        ]
        return _reopen, (specs, self.options, self.identity, self.samples.text_tokens)

    # -- items ---------------------------------------------------------------------------------------------------
    @cached_property
    def items_per_epoch(self) -> int:
        """Items of the first epoch; later ones may differ by a few, or by what weights say.

        Arithmetic for clips. Packs and groups are made once for it, a microsecond or less per sample.
        """
        return sum(self._size(0, chunk) for chunk in range(self.chunks.count(0)))

    def epoch(self, number: int) -> Items:
        """All items of one epoch, in order: for evaluation and small sets. The last one asked for is kept."""
        if self._epoch is None or self._epoch[0] != number:
            self._epoch = number, joined(list(self.chunks.of_epoch(number)))
        return self._epoch[1]

    def advance(self, cursor: Cursor, items: int) -> Cursor:
        """The cursor ``items`` further on, across chunks and epochs. It never points past the last item of a chunk."""
        epoch, chunk, item = cursor.epoch, cursor.chunk, cursor.item + items
        while item >= (size := self._size(epoch, chunk)):
            (epoch, chunk), item = self.chunks.after(epoch, chunk), item - size
        return Cursor(epoch, chunk, item, cursor.consumed + items)

    def items(self, cursor: Cursor, count: int, showings: bool = False) -> tuple[Items, Cursor]:
        """The next ``count`` items across chunks and epochs, and the cursor after them.

        ``showings``: their elements say how often the run has shown their samples before (not for packs).
        """
        parts: list[Items] = []
        place = self.advance(cursor, 0)
        while count or not parts:
            chunk = self._cache.chunk(place.epoch, place.chunk)
            stop = min(place.item + count, len(chunk))
            parts.append((self._shown(place.epoch, place.chunk) if showings else chunk).part(place.item, stop))
            count -= stop - place.item
            self._cache.begin_next(place.epoch, place.chunk)
            place = self.advance(place, stop - place.item)
        return joined(parts), place

    def _make_shown(self, epoch: int, chunk: int) -> Items:
        items = self._cache.chunk(epoch, chunk)
        return items.shown(self.chunks.showings(epoch, chunk, items.elements["sample"]))

    def _size(self, epoch: int, chunk: int) -> int:
        """Items of a chunk."""
        if self.options.kind == "clip":
            return self.chunks.clips(epoch, chunk)
        return len(self._cache.chunk(epoch, chunk))

    # -- state ---------------------------------------------------------------------------------------------------
    def state(self, cursor: Cursor) -> dict[str, Any]:
        """What a checkpoint keeps of the data: the cursor and what it refers to (< 1 KB)."""
        return {**cursor.to_dict(), "fingerprint": self.fingerprint, "identity": self.identity}

    def restore(self, state: Mapping[str, Any]) -> Cursor:
        """The cursor of a state (``identity`` may be missing). Raises DataError naming what differs from this plan."""
        theirs = str(state.get("fingerprint"))
        if theirs != self.fingerprint:
            named = plan_options.differences(state["identity"], self.identity) if state.get("identity") else []
            raise DataError(
                "the data state belongs to another order of samples: "
                + "; ".join(named or plan_options.differing_parts(theirs, self.fingerprint)),
                where="data state of the checkpoint",
                fix="restore the shards and data options of the original run, or start a new run from its weights",
            )
        cursor = Cursor.from_dict({name: state.get(name, -1) for name in Cursor._fields})
        if cursor.chunk >= self.chunks.count(cursor.epoch):
            raise DataError(
                f"chunk {cursor.chunk} is beyond the {self.chunks.count(cursor.epoch)} of epoch {cursor.epoch}",
                where="data state of the checkpoint",
                fix="resume from an intact checkpoint",
            )
        return cursor


def _choose(options: PlanOptions) -> Choose:
    """Which rows have something to show: documents with tokens, and sequences that fit if longer ones are dropped."""

    def choose(numbers: Mapping[str, Any]) -> Any:
        if options.kind == "pack":
            return numbers["tokens"] > 0
        if options.kind == "sequence" and options.drop_longer:
            return options.lengths(numbers) <= options.block_tokens
        return np.ones(len(numbers["tokens"]), dtype=bool)

    return choose


def _refuse_longer(samples: Samples, options: PlanOptions) -> None:
    count, longest, worst = 0, options.block_tokens, -1
    for first, lengths in all_lengths(samples, options):
        count += int((lengths > options.block_tokens).sum())
        if lengths.max() > longest:
            longest, worst = int(lengths.max()), first + int(lengths.argmax())
    if count:
        row = samples.row(worst)
        raise DataError(
            f"{count} samples are longer than block_tokens={options.block_tokens}; the longest has {longest} tokens",
            where=f"{samples.shards[samples.shard_of[worst]]}:{row.key} ({row.corpus}/{row.sample_id})",
            fix="raise block_tokens (data.pack_tokens of a recipe) or lower max_frames"
            + (", or set drop_longer to leave such samples out" if samples.text_tokens is None else ""),
        )


def _reopen(specs: list[tuple[Any, ...]], options: PlanOptions, identity: dict[str, Any], counted: Ints | None) -> Plan:
    sources = [Source(open_index(folder, cache), *selected) for folder, cache, *selected in specs]
    plan = Plan(sources, options, None if counted is None else lambda samples: counted)
    if changes := plan_options.differences(identity, plan.identity):
        raise DataError(
            "the shards changed while the run was reading them: " + "; ".join(changes),
            where=", ".join(str(folder) for folder, *_ in specs),
            fix="never rebuild a shard set in place under a running job; build into a new folder",
        )
    return plan
