"""Batches for training and evaluation: the plan's items, read and collated by worker processes.

Which item goes to which rank, accumulation slot and worker is arithmetic on the plan, so global batches do not depend
on the world size or the number of workers, and no worker holds any state. Workers come from a fork server: forking
the training process would copy its threads' locks (gloo, CUDA), and spawning costs each worker an import of torch
(measured: 2.9 s and 148 MB private per pair of spawned workers, 1.25 s once and 11 MB each from the fork server).
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import multiprocessing.forkserver
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from shards.errors import DataError
from shards.plan import Cursor, Plan
from shards.reader import Reader
from shards.step import LoaderOptions, Request, StepBatch
from shards.substitute import BadSample, Fetch, fetch_item

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Collate = Callable[[list[list[Any]]], Batch]
"""``collate(items)``: per item its raw samples -> one micro-batch. Runs in the worker."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler or a terminal sends to every process of a job; only the trainer may act on it."""
_POLL_SECONDS = 2.0  # how soon a dead worker is noticed
_INLINE_BYTES = 1 << 18


class _Made(NamedTuple):
    """What a worker hands back. An error travels as a value: torch would keep only its text."""

    batch: Batch | None
    bad: list[BadSample]
    error: DataError | None = None


@dataclass(frozen=True, slots=True)
class _Inline:
    """A small tensor as an array: it travels through the pipe, which costs a third of a shared memory segment."""

    array: np.ndarray


def _packed(batch: Batch) -> Batch:
    return {
        name: _Inline(value.numpy())
        if isinstance(value, torch.Tensor) and value.nbytes <= _INLINE_BYTES and value.dtype != torch.bfloat16
        else value
        for name, value in batch.items()
    }


def _opened(made: _Made) -> _Made:
    """The batch as collated; raises the error that came instead."""
    if made.error is not None:
        raise made.error
    batch = made.batch or {}
    tensors = {name: torch.from_numpy(value.array) for name, value in batch.items() if isinstance(value, _Inline)}
    return made._replace(batch={**batch, **tensors})


class _MicroBatches(Dataset[_Made]):
    """Map-style dataset from requests to micro-batches; stateless, so any worker can make any of them."""

    def __init__(self, reader: Reader, fetch: Fetch, collate: Collate, substitute: bool) -> None:
        self.reader, self.fetch, self.collate, self.substitute = reader, fetch, collate, substitute

    def __getitem__(self, request: Request) -> _Made:
        raws: list[list[Any]] = []
        bad: list[BadSample] = []
        try:
            for number, item in enumerate(request.items()):
                if self.substitute:
                    after = Cursor(request.step_end.epoch, request.step_end.item + request.first + number)
                    found, replaced = fetch_item(self.reader, self.fetch, item, after)
                    raws.append(found)
                    bad += replaced
                else:
                    raws.append(list(self.fetch(self.reader, item)))
            return _Made(_packed(self.collate(raws)), bad)
        except DataError as error:
            return _Made(None, bad, error)


class _Requests(Sampler[Request]):
    """The requests a DataLoader hands to its workers, made anew for every iteration."""

    def __init__(self, make: Callable[[], Iterator[Request]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Request]:
        return self.make()


def _as_made(made: Any) -> Any:
    """In place of torch's default conversion, which would walk through the batch."""
    return made


def _start_worker(worker: int) -> None:
    del worker
    torch.set_num_threads(1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _fork_server() -> ForkServerContext:
    """The fork server with torch imported, deaf to the signals meant for the trainer.

    Ignored signals are inherited, so they are ignored here while it starts, and blocked so that none is lost meanwhile.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.utils.data", __name__])
    numbers = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def _kill(workers: list[BaseProcess]) -> None:
    """End stateless readers at once: waiting for one that hangs in a read would hang this process too."""
    for process in workers:
        process.kill()


class _Stream:
    """Micro-batches in the order of the requests, from worker processes or inline."""

    def __init__(self, dataset: _MicroBatches, requests: _Requests, options: LoaderOptions) -> None:
        self.timeout_seconds = options.timeout_seconds
        parallel: dict[str, Any] = {}
        if options.workers:
            parallel = {
                "multiprocessing_context": _fork_server(),
                "prefetch_factor": options.prefetch,
                "timeout": min(_POLL_SECONDS, options.timeout_seconds),
                "worker_init_fn": _start_worker,
            }
        before = set(multiprocessing.active_children())
        data: DataLoader[_Made] = DataLoader(
            dataset,
            batch_size=None,
            sampler=requests,
            num_workers=options.workers,
            collate_fn=_as_made,
            generator=torch.Generator(),  # the default one would advance the training's random numbers
            **parallel,
        )
        self.batches = iter(data)
        workers = [process for process in multiprocessing.active_children() if process not in before]
        self.stop = weakref.finalize(self, _kill, workers)

    def __iter__(self) -> Iterator[_Made]:
        return self

    def __next__(self) -> _Made:
        deadline = time.monotonic() + self.timeout_seconds
        while True:
            try:
                made = next(self.batches)
            except RuntimeError as error:
                if str(error).startswith("DataLoader timed out") and time.monotonic() < deadline:
                    continue  # no worker died; it may be a slow read
                if not str(error).startswith(("DataLoader worker (pid", "DataLoader timed out")):
                    raise
                self.stop()
                raise DataError(
                    f"a loader process died or sent nothing for {self.timeout_seconds:.0f} s ({error})",
                    where="data loader",
                    fix="look for the out-of-memory killer and for hung file systems; lower data.workers",
                ) from error
            return _opened(made)


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
        """Damaged samples this process has replaced so far, by sample number."""
        self._dataset = _MicroBatches(Reader(plan, options.verify), fetch, collate, substitute=True)

    def __iter__(self) -> Iterator[StepBatch]:
        stream = _Stream(self._dataset, _Requests(self._requests), self.options)
        while True:
            begin = time.perf_counter()
            made = [next(stream) for _ in range(self.options.accumulation_steps)]
            waited = time.perf_counter() - begin
            skipped = [bad for part in made for bad in part.bad]
            self._count(skipped)
            self.cursor = self.plan.advance(self.cursor, self.options.global_batch)
            batches = [part.batch for part in made if part.batch is not None]
            yield StepBatch(batches, self.cursor, skipped, waited, self.options.global_batch)

    def state_dict(self) -> dict[str, Any]:
        """Position after the last step handed out, and what it refers to; the same on every rank, < 1 KB."""
        return self.plan.state(self.cursor)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, at any world size. Raises DataError naming the difference for another plan's."""
        self.cursor = self.plan.restore(state)

    def _requests(self) -> Iterator[Request]:
        """Requests of this rank from the current cursor on; runs ahead of the steps by the prefetch."""
        begin, options = self.cursor, self.options
        while True:
            end = self.plan.advance(begin, options.global_batch)
            for slot in range(options.accumulation_steps):
                offset = options.slot_offset(slot)
                items, _ = self.plan.items(self.plan.advance(begin, offset), options.micro_batch)
                yield Request.of(items, end, offset)
            begin = end

    def _count(self, skipped: list[BadSample]) -> None:
        for bad in skipped:
            if bad.sample not in self.bad_samples:
                logger.warning("damaged sample replaced: %s", bad)
            self.bad_samples[bad.sample] = bad
        if len(self.bad_samples) > self.options.max_bad_samples:
            latest = list(self.bad_samples.values())[-1]
            raise DataError(
                f"{len(self.bad_samples)} damaged samples, more than max_bad_samples={self.options.max_bad_samples}; "
                f"the latest: {latest.reason}",
                where=f"{latest.shard}:{latest.key}",
                fix="run `slt shards lint DIR` and rebuild or copy the shards, or raise data.max_bad_samples",
            )


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
    max_batches: int = 0
    """Micro-batches per rank; 0 = all."""
    max_samples: int = 0
    """Items over all ranks; 0 = all."""
    workers: int = 0
    timeout_seconds: float = 600.0
    _dataset: _MicroBatches = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._dataset = _MicroBatches(Reader(self.plan), self.fetch, self.collate, substitute=False)
        self.n_items = min(self.plan.items_per_epoch, self.max_samples or self.plan.items_per_epoch)

    def __len__(self) -> int:
        """Micro-batches every rank goes through with ``padded``; the same number on all of them."""
        batches = math.ceil(math.ceil(self.n_items / self.world_size) / self.micro_batch)
        return min(batches, self.max_batches or batches)

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        """This rank's micro-batches with the sample number of every element in them."""
        requests = list(self._requests())
        options = LoaderOptions(self.rank, self.world_size, 1, 1, self.workers, timeout_seconds=self.timeout_seconds)
        stream = _Stream(self._dataset, _Requests(lambda: iter(requests)), options)
        for request, made in zip(requests, stream, strict=True):
            assert made.batch is not None  # without substitutes there is a batch or an error
            yield made.batch, [int(sample) for item in request.items() for sample in item["sample"]]

    def padded(self) -> Iterator[tuple[Batch, list[int]]]:
        """Like iterating, but the same number of batches on every rank, as collective calls need it.

        What is missing is filled with a batch already seen, and an empty list of samples: compute and forget it.
        """
        filler: Batch | None = None
        made = 0
        for batch, samples in self:
            filler = batch if filler is None else filler
            made += 1
            yield batch, samples
        if made < len(self) and filler is None:  # fewer items than ranks
            filler = _opened(self._dataset[Request.of([self.plan.epoch(0).item(0)], Cursor())]).batch
        for _ in range(made, len(self)):
            assert filler is not None
            yield filler, []

    def _requests(self) -> Iterator[Request]:
        epoch = self.plan.epoch(0)
        mine = range(self.rank, self.n_items, self.world_size)
        for batch in range(min(len(self), math.ceil(len(mine) / self.micro_batch))):
            numbers = mine[batch * self.micro_batch : (batch + 1) * self.micro_batch]
            yield Request.of([epoch.item(number) for number in numbers], Cursor())
