"""Makes the chunks of a plan: each a pure function of (index, options, epoch, chunk), at the cost of the chunk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from shards.order import packing, shuffle, unique_texts
from shards.order.items import Items
from shards.order.mix import Mixture, chunk_range
from shards.order.options import PlanOptions
from shards.order.samples import Samples
from shards.order.shuffle import Ints, Stream
from shards.order.unique_texts import Texts

CHUNK_SAMPLES = 1 << 16
"""Four windows of the shuffle; the last packs of a chunk stay emptier, so it must not be small."""
CHUNK_PACKS = 512
"""Short documents in long blocks: a chunk grows until it fills about so many packs."""
_LARGEST = 16  # times CHUNK_SAMPLES


class Chunks:
    """The chunks of every epoch.

    Args:
        samples: the selected rows.
        mixture: how many of them an epoch takes.
        options: how items are made.
    """

    def __init__(self, samples: Samples, mixture: Mixture, options: PlanOptions) -> None:
        self.samples, self.mixture, self.options = samples, mixture, options
        self.streams = [
            Stream(count, options.seed, source, options.shuffle) for source, count in enumerate(samples.counts)
        ]
        self._firsts = np.concatenate([[0], np.cumsum(samples.counts)]).tolist()
        self.size = _chunk_samples(samples, options)
        """Samples of a chunk at most."""
        self._alone = lru_cache(maxsize=3)(self._make_alone)
        self.clips = lru_cache(maxsize=256)(self._count_samples)
        """``clips(epoch, chunk)``: samples of a chunk, which are its items where each is one clip."""

    def count(self, epoch: int) -> int:
        """Chunks of an epoch."""
        return -(-sum(self.mixture.quotas(epoch)) // self.size)

    def after(self, epoch: int, chunk: int) -> tuple[int, int]:
        """Epoch and number of the chunk that follows."""
        return (epoch, chunk + 1) if chunk + 1 < self.count(epoch) else (epoch + 1, 0)

    def of_epoch(self, epoch: int) -> Iterator[Items]:
        """The chunks of one epoch, one after another."""
        for chunk in range(self.count(epoch)):
            yield self.make(epoch, chunk)

    def ranges(self, epoch: int, chunk: int) -> list[tuple[int, int]]:
        """Per source the part of its share of the epoch, ``[begin, end)``, that lies in a chunk."""
        quotas, chunks = self.mixture.quotas(epoch), self.count(epoch)
        if self.options.shuffle:
            return [chunk_range(quota, chunk, chunks) for quota in quotas]
        total, ranges, first = sum(quotas), [], 0
        for quota in quotas:  # one source after another
            begin, end = (min(max(total * n // chunks - first, 0), quota) for n in (chunk, chunk + 1))
            ranges.append((begin, end))
            first += quota
        return ranges

    def _count_samples(self, epoch: int, chunk: int) -> int:
        return sum(end - begin for begin, end in self.ranges(epoch, chunk))

    def order(self, epoch: int, chunk: int) -> Ints:
        """Sample numbers of a chunk: the sources spread evenly, each in the order of its stream."""
        quotas, begins = self.mixture.quotas(epoch), self.mixture.begins(epoch)
        parts, places = [], []
        for source, (begin, end) in enumerate(self.ranges(epoch, chunk)):
            if begin < end:
                taken = self.streams[source].take(begins[source] + begin, begins[source] + end)
                parts.append(taken + self._firsts[source])
                places.append((np.arange(begin, end) + 0.5) / quotas[source])
        if not parts:
            return np.empty(0, dtype=np.int64)
        merged = np.concatenate(parts)
        if not self.options.shuffle or len(parts) == 1:
            return merged
        return merged[np.argsort(np.concatenate(places), kind="stable")]

    def make(self, epoch: int, chunk: int) -> Items:
        """The items of a chunk in order."""
        items, distance = self._alone(epoch, chunk), self.options.unique_texts_window
        if distance < 2:
            return items
        before = self._before(epoch, chunk)
        tail = self._texts(self._alone(*before)).tail(distance - 1) if before else unique_texts.no_texts()
        return items.reorder(*unique_texts.join(self._texts(items), tail, distance))

    def _make_alone(self, epoch: int, chunk: int) -> Items:
        """The items without regard to the chunk before."""
        items = self._form(epoch, chunk)
        if self.options.unique_texts_window < 2:
            return items
        return items.reorder(unique_texts.spread(self._texts(items), self.options.unique_texts_window), 0)

    def _form(self, epoch: int, chunk: int) -> Items:
        options, samples = self.options, self.order(epoch, chunk)
        lengths = self.lengths(samples)
        if options.kind in ("pack", "sequence"):
            return packing.pack(samples, lengths, options.block_tokens)
        if options.kind == "group":
            texts = self.samples.columns["text_hash"][samples] if options.unique_texts_window else None
            assert options.frame_budget is not None  # check_options
            items, windows = packing.group(samples, lengths, options.frame_budget, options.length_window, texts)
            if options.shuffle:
                items = items.reorder(shuffle.shuffle_groups(windows, options.seed, epoch, chunk), 0)
            return items
        if options.length_window:
            positions = packing.sort_windows(lengths, options.length_window)
            samples, lengths = samples[positions], lengths[positions]
        return packing.clips(samples, lengths)

    def showings(self, epoch: int, chunk: int, samples: Ints) -> Ints:
        """How often the run has shown the samples of a chunk before; not for packs, which cut documents.

        It is the pass of the source's stream, as every pass shows each sample once: the epoch where the weight is 1.

        Args:
            samples: [n] those of the chunk's elements, in their order.
        """
        showings, several = np.zeros(len(samples), dtype=np.int64), False
        begins = self.mixture.begins(epoch)
        for source, (begin, end) in enumerate(self.ranges(epoch, chunk)):
            first, count = self._firsts[source], self.samples.counts[source]
            number, place = divmod(begins[source] + begin, count)
            mine = (samples >= first) & (samples < first + count)
            showings[mine] = number
            if place + end - begin > count:  # only what is left of this pass is shown in it, all else first in the next
                left = self.streams[source].take(number * count + place, (number + 1) * count) + first
                showings[mine & ~np.isin(samples, left)] += 1
                several = True
        return showings + _occurrences_before(samples) if several else showings

    def lengths(self, samples: Ints) -> Ints:
        """Tokens or frames of these samples."""
        return _lengths(self.samples, samples, self.options)

    def _texts(self, items: Items) -> Texts:
        return Texts(items.starts, self.samples.columns["text_hash"][items.elements["sample"]])

    def _before(self, epoch: int, chunk: int) -> tuple[int, int] | None:
        if chunk:
            return epoch, chunk - 1
        return (epoch - 1, self.count(epoch - 1) - 1) if epoch else None


def all_lengths(samples: Samples, options: PlanOptions) -> Iterator[tuple[int, Ints]]:
    """Tokens or frames of all samples, a million at a time, with the number of the first."""
    for first in range(0, len(samples), 1 << 20):
        yield first, _lengths(samples, np.arange(first, min(first + (1 << 20), len(samples))), options)


def _lengths(samples: Samples, numbers: Ints, options: PlanOptions) -> Ints:
    tokens = samples.columns["tokens"] if samples.text_tokens is None else samples.text_tokens
    return options.lengths({"frames": samples.columns["frames"][numbers], "tokens": tokens[numbers]})


def _occurrences_before(values: Ints) -> Ints:
    """[n] how often each value stands before its place."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.empty(len(values), dtype=np.int64)
    counts[order] = np.arange(len(values)) - np.repeat(begins, np.diff(begins, append=len(values)))
    return counts


def _chunk_samples(samples: Samples, options: PlanOptions) -> int:
    if options.kind not in ("pack", "sequence"):
        return CHUNK_SAMPLES
    tokens = sum(int(lengths.sum()) for _, lengths in all_lengths(samples, options))
    wanted = -(-CHUNK_PACKS * options.block_tokens * len(samples) // max(tokens, 1))
    return CHUNK_SAMPLES * min(max(-(-wanted // CHUNK_SAMPLES), 1), _LARGEST)
