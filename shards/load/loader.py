"""Batches for training and evaluation: the plan's items, read and collated in this process or by workers.

Which item goes to which rank, accumulation slot and worker is arithmetic on the plan, so global batches do not depend
on the world size or the number of workers, and no worker holds any state. While the workers start, this process makes
the micro-batches itself: the first one comes at once, and it is the same.
"""

from __future__ import annotations

import copyreg
import io
import logging
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise, starmap
from typing import Any, NamedTuple

import numpy as np
import torch

from shards.errors import DataError
from shards.load.prefetch import Prefetcher
from shards.load.read_ahead import ReadAhead
from shards.load.reader import Reader, SampleReader
from shards.load.requests import LoaderOptions, Request, StepBatch, items_of
from shards.load.substitute import BadSample, Fetch, fetch_item
from shards.load.workers import Pickled, Workers, fork_server
from shards.order.items import Items, joined, without_showings
from shards.order.plan import Cursor, Plan
from shards.storage.access import Remote

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
Collate = Callable[[list[list[Any]]], Batch]
"""``collate(items)``: per item its raw samples -> one micro-batch. Runs in the worker."""


_TOGETHER = 16
"""Most micro-batches read together by this process: small samples then lie close enough to share a read."""
_INSIDE_BYTES = 32 << 10
"""Most bytes of tensors and arrays that are part of a pickle, and so copied when it is read."""


class _Result(NamedTuple):
    """A micro-batch, or the error that came instead: it travels as a value, so that it keeps its parts."""

    batch: Batch | None
    bad: list[BadSample]
    error: DataError | None = None
    elements: bytes = b""
    """As in `StepBatch`."""

    def unwrap(self) -> _Result:
        """Itself; raises the error that came instead."""
        if self.error is not None:
            raise self.error
        return self


@dataclass
class _BatchMaker:
    """Makes micro-batches of requests; stateless, so any process can make any of them."""

    reader: Reader
    fetch: Fetch
    collate: Collate
    substitute: bool

    def begin(self) -> None:
        """Once in every worker: one thread each, as there are several of them."""
        torch.set_num_threads(1)

    def result(self, request: Request) -> _Result:
        """The micro-batch of a request."""
        return next(self.results([request]))

    def results(self, requests: list[Request]) -> Iterator[_Result]:
        """The micro-batches of requests (at least one), whose samples are read together."""
        items = items_of(requests)
        ahead = ReadAhead(self.reader, items)
        bounds = pairwise(accumulate((len(request.sizes) for request in requests), initial=0))
        return (self._result(ahead, *each) for each in zip(requests, starmap(items.part, bounds), strict=True))

    def _result(self, reader: SampleReader, request: Request, items: Items) -> _Result:
        raws: list[list[Any]] = []
        bad: list[BadSample] = []
        try:
            for number, item in enumerate(items):
                if self.substitute:
                    samples, replaced = fetch_item(reader, self.fetch, item, request.after(number))
                    raws.append(samples)
                    bad += replaced
                else:
                    raws.append(list(self.fetch(reader, item)))
            read = without_showings(items.elements) if request.showings else items.elements
            return _Result(self.collate(raws), bad, elements=read.tobytes())
        except DataError as error:
            return _Result(None, bad, error)

    def run(self, requests: list[Request]) -> list[Pickled]:
        """The same, pickled; the bytes of large tensors and arrays apart."""
        reducers = {**copyreg.dispatch_table, torch.Tensor: _reduced}
        return [_pickled(result, reducers) for result in self.results(requests)]


def _pickled(result: _Result, reducers: dict[Any, Any]) -> Pickled:
    stream = io.BytesIO()
    apart: list[memoryview] = []
    inside = 0

    def stays(buffer: pickle.PickleBuffer) -> bool:
        """Small ones are copied: what keeps one of them must not keep a whole message."""
        nonlocal inside
        raw = buffer.raw()
        if inside + raw.nbytes <= _INSIDE_BYTES:
            inside += raw.nbytes
            return True
        apart.append(raw)
        return False

    pickler = pickle.Pickler(stream, protocol=5, buffer_callback=stays)
    pickler.dispatch_table = reducers
    pickler.dump(result)
    return stream.getvalue(), apart


def _reduced(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A tensor as an array, whose bytes pickle leaves out."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:  # NumPy has no such type
        return _tensor, (plain.view(torch.int16).numpy(), torch.bfloat16)
    return _tensor, (plain.numpy(), None)


def _tensor(array: Any, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.view(dtype)


def preload_workers(*modules: str) -> None:
    """Begin to import what worker processes need, torch above all, beside whatever the caller does next.

    Called before a model is built, it saves the workers' start in the first steps; without it everything works alike.
    The first call of a process counts.

    Args:
        modules: where the fetch and collate functions are, and what they import.
    """
    fork_server(["__main__", "torch", __name__, *sorted(set(modules) - {"__main__"})])


class _Stream:
    """Micro-batches in the order of the requests, by worker processes or by this one."""

    def __init__(self, maker: _BatchMaker, requests: Iterator[Request], options: LoaderOptions) -> None:
        self._maker, self._requests = maker, requests
        self._here: Iterator[_Result] = iter(())
        self._together = 1
        self._workers: Workers | None = None
        if options.workers:
            parts = (maker.fetch, maker.collate)
            preload_workers(*(getattr(part, "__module__", type(part).__module__) for part in parts))
            self._workers = Workers(maker, options.workers, options.prefetch, options.timeout_seconds)

    def __iter__(self) -> Iterator[_Result]:
        return self

    def __next__(self) -> _Result:
        workers = self._workers
        if workers is None:
            return self._next_here().unwrap()
        if not (workers.waiting or workers.started()):
            return self._maker.result(next(self._requests)).unwrap()
        workers.fill(self._requests)
        if not workers.waiting:
            raise StopIteration
        result: _Result = workers.take()
        workers.fill(self._requests)  # before this one is used: no worker waits for the consumer
        return result.unwrap()

    def _next_here(self) -> _Result:
        result = next(self._here, None)
        if result is None:
            requests = list(islice(self._requests, self._together))
            if not requests:
                raise StopIteration
            self._together = min(2 * self._together, _TOGETHER)  # the first one comes at once
            self._here = self._maker.results(requests)
            result = next(self._here)
        return result


class StepLoader:
    """Endless steps over the plan, resumable at any of them.

    Item ``j`` of a step goes to accumulation slot ``j // (micro_batch x world_size)`` of rank
    ``j // micro_batch % world_size``: the items of a step, and their order over slots and ranks, are the same at every
    world size.

    Args:
        plan: the order; must be equal on all ranks.
        fetch: ``fetch(reader, item)`` -> one raw sample per element; picklable; must not use global random numbers.
        collate: ``collate(items)`` -> dict of tensors; picklable.
        options: share and workers.
        cursor: where to begin.

    Raises:
        ValueError: the global batch cannot be divided over ranks and micro-batches.
    """

    def __init__(
        self, plan: Plan, fetch: Fetch, collate: Collate, options: LoaderOptions, cursor: Cursor | None = None
    ) -> None:
        share = options.micro_batch * options.world_size
        if options.global_batch % share or not 0 <= options.rank < options.world_size:
            raise ValueError(
                f"global_batch={options.global_batch} is not a multiple of micro_batch={options.micro_batch} x "
                f"world_size={options.world_size}, or rank={options.rank} is outside the world"
            )
        self.plan, self.options = plan, options
        self.cursor = cursor or Cursor()
        """Where the next step begins."""
        self.bad_samples: dict[int, BadSample] = {}
        """Damaged samples this process has replaced so far, by sample number. How many are too many is decided by the
        trainer, for all ranks at the same step."""
        self._draws = bool(getattr(fetch, "draws", False))
        reader = Reader(plan, options.verify, remote=options.remote)
        self._maker = _BatchMaker(reader, fetch, collate, substitute=True)

    def __iter__(self) -> Iterator[StepBatch]:
        stream = _Stream(self._maker, self._requests(), self.options)
        while True:
            begin = time.perf_counter()
            results = [next(stream) for _ in range(self.options.accumulation_steps)]
            waited = time.perf_counter() - begin
            skipped = [bad for result in results for bad in result.bad]
            self._report(skipped)
            self.cursor = self.plan.advance(self.cursor, self.options.global_batch)
            batches = [result.batch for result in results if result.batch is not None]
            read = b"".join(result.elements for result in results)
            yield StepBatch(batches, self.cursor, skipped, waited, self.options.global_batch, read)

    def state_dict(self, after: StepBatch | None = None) -> dict[str, Any]:
        """Position after a step, and what it refers to; the same on every rank, < 1 KB.

        Args:
            after: a step that was handed out; None = the last one.
        """
        return self.plan.state(self.cursor if after is None else after.cursor_after)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, at any world size. Raises DataError naming the difference for another plan's."""
        self.cursor = self.plan.restore(state)

    def _requests(self) -> Iterator[Request]:
        """Requests of this rank from the current cursor on; runs ahead of the steps by the prefetch."""
        prefetcher = Prefetcher(self.plan.samples.shards, self.options.remote)
        coming = self._shards(self.cursor)
        for begin, end in self._steps(self.cursor):
            if prefetcher.active:
                prefetcher.step(coming)
            for slot in range(self.options.accumulation_steps):
                offset = self.options.slot_offset(slot)
                yield Request.of(self._items(begin, slot, self._draws), end, offset, self._draws)

    def _steps(self, begin: Cursor) -> Iterator[tuple[Cursor, Cursor]]:
        """Where each step begins and ends."""
        while True:
            end = self.plan.advance(begin, self.options.global_batch)
            yield begin, end
            begin = end

    def _items(self, begin: Cursor, slot: int, showings: bool = False) -> Items:
        """This rank's items of an accumulation slot."""
        offset, count = self.options.slot_offset(slot), self.options.micro_batch
        return self.plan.items(self.plan.advance(begin, offset), count, showings)[0]

    def _shards(self, begin: Cursor) -> Iterator[list[int]]:
        """The shards this rank reads in each step."""
        for start, _ in self._steps(begin):
            items = joined([self._items(start, slot) for slot in range(self.options.accumulation_steps)])
            yield np.unique(self.plan.samples.shard_of[items.elements["sample"]]).tolist()

    def _report(self, skipped: list[BadSample]) -> None:
        for bad in skipped:
            if bad.sample not in self.bad_samples:
                logger.warning("damaged sample replaced: %s", bad)
            self.bad_samples[bad.sample] = bad


@dataclass
class EvalLoader:
    """One pass over a plan's first epoch for evaluation: every item exactly once over all ranks, nothing repeated.

    Rank ``r`` reads items ``r, r + world_size, ...``. A damaged sample raises DataError: a score over another set of
    samples than the reported one is worth nothing.
    """

    plan: Plan
    fetch: Fetch
    collate: Collate
    rank: int = 0
    world_size: int = 1
    micro_batch: int = 1
    max_samples: int = 0
    """Items over all ranks; 0 = all."""
    workers: int = 0
    timeout_seconds: float = 600.0
    remote: Remote = field(default_factory=Remote)
    _maker: _BatchMaker = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._maker = _BatchMaker(Reader(self.plan, remote=self.remote), self.fetch, self.collate, substitute=False)
        self.n_items = min(self.plan.items_per_epoch, self.max_samples or self.plan.items_per_epoch)

    def __len__(self) -> int:
        """Micro-batches every rank goes through with ``padded``; the same number on all of them."""
        return math.ceil(math.ceil(self.n_items / self.world_size) / self.micro_batch)

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        """This rank's micro-batches with the sample number of every element in them."""
        requests = list(self._requests())
        options = LoaderOptions(self.rank, self.world_size, 1, 1, self.workers, timeout_seconds=self.timeout_seconds)
        stream = _Stream(self._maker, iter(requests), options)
        for request, result in zip(requests, stream, strict=True):
            assert result.batch is not None  # without substitutes there is a batch or an error
            yield result.batch, items_of([request]).elements["sample"].tolist()

    def padded(self) -> Iterator[tuple[Batch, list[int]]]:
        """Like iterating, but the same number of batches on every rank, as collective calls need it.

        What is missing is filled with a batch already seen, and an empty list of samples: compute and forget it.
        """
        filler: Batch | None = None
        read = 0
        for batch, samples in self:
            filler = batch if filler is None else filler
            read += 1
            yield batch, samples
        if read < len(self) and filler is None:  # fewer items than ranks
            filler = self._maker.result(Request.of([self.plan.epoch(0).item(0)], Cursor())).unwrap().batch
        for _ in range(read, len(self)):
            assert filler is not None
            yield filler, []

    def _requests(self) -> Iterator[Request]:
        epoch = self.plan.epoch(0)
        mine = range(self.rank, self.n_items, self.world_size)
        for batch in range(min(len(self), math.ceil(len(mine) / self.micro_batch))):
            numbers = mine[batch * self.micro_batch : (batch + 1) * self.micro_batch]
            yield Request.of([epoch.item(number) for number in numbers], Cursor())
