"""Saves checkpoints beside the training: a snapshot, then files, then their name.

The training thread takes the snapshot. A thread of every rank writes its files. Once all ranks are done, a thread of
rank 0 writes the manifest, gives the checkpoint its name and removes old ones. All exchanges between ranks are made by
the training threads, between two steps. With `train.checkpoint.background: false` all of it happens at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import dist
from pipeline.engine.averaging import averaged
from pipeline.engine.checkpoint import TAG, checkpoint_folder
from pipeline.engine.durable import named_if_unwritable
from pipeline.engine.saving.files import Parts, RankFiles, complete, export_files
from pipeline.engine.saving.publish import COMPLETE, temporary_folder
from pipeline.engine.saving.retention import mark_best, prune
from pipeline.engine.saving.snapshot import Captured, HostBuffers, capture
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.state import rng_state
from pipeline.engine.training import Training
from pipeline.errors import CheckpointError
from pipeline.stages.freezing import frozen_names

logger = logging.getLogger(__name__)

Timed = tuple[Any, float]
"""A result and the seconds it took."""


@dataclass(slots=True)
class _Pending:
    """A checkpoint on its way."""

    final: Path
    step: int
    best: bool
    work: Future[Timed]
    """What this rank does for it now: writes files, then (on rank 0) completes them."""
    written: bool = False
    """All ranks have written their files."""
    stall_seconds: float = 0.0
    """The training thread spent on it, waits included."""
    write_seconds: float = 0.0
    """The slowest rank's, and rank 0's for the rest."""


class Saver:
    """Saves checkpoints of one run, one at a time. All ranks call its methods at the same step borders.

    Raises:
        StorageError: from `begin`, on one rank: state offloaded to NVMe could not be copied.
        CheckpointError: from `begin`, `advance` and `finish`, on every rank: a file could not be written (full disk,
            permissions). Nothing half-written is left, and earlier checkpoints are untouched.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.background = training.recipe.train.checkpoint.background
        self.buffers = HostBuffers()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self._once: dict[str, bytes] = {}

    @property
    def done_here(self) -> bool:
        """This rank's part of a checkpoint on its way is done; the others' may not be."""
        return self._pending is not None and self._pending.work.done()

    @property
    def pending(self) -> bool:
        """A checkpoint is on its way."""
        return self._pending is not None

    def begin(self, best: bool, outputs: bool = True) -> Metrics:
        """Take a snapshot of this step and start to write it; first waits for the one before. Returns its metrics.

        Args:
            best: the weights are the best so far.
            outputs: also the live model's outputs, with which an export is compared; they cost a forward pass.
        """
        metrics = self.finish()
        began = time.monotonic()
        job, step = self._job(outputs), self.training.state.step
        final = checkpoint_folder(self.training.run_dir) / f"step-{step:06d}"
        self._pending = _Pending(final, step, best, self._run(job))
        self._pending.stall_seconds = time.monotonic() - began
        return metrics if self.background else metrics | self.finish()

    def advance(self) -> Metrics:
        """Take the next step with the checkpoint on its way, once all ranks are done with this one; else waits.

        Returns:
            The checkpoint's metrics, when it is complete.
        """
        pending = self._pending
        assert pending is not None, "no checkpoint is on its way"
        with _stalled(pending):
            parts = self._results(pending)
            if not pending.written:
                pending.written = True
                pending.work = self._run(partial(self._complete, pending, parts) if dist.is_main() else dict)
                return {}
        self._pending = None
        logger.info(
            "checkpoint step %d complete: stalled %.2f s, written in %.1f s",
            pending.step, pending.stall_seconds, pending.write_seconds,
        )  # fmt: skip
        return {
            "checkpoint/stall_seconds": pending.stall_seconds,
            "checkpoint/write_seconds": pending.write_seconds,
        }

    def finish(self) -> Metrics:
        """Wait until no checkpoint is on its way."""
        metrics: Metrics = {}
        while self._pending is not None:
            metrics = self.advance()
        return metrics

    def _job(self, outputs: bool) -> Callable[[], Parts]:
        """What this rank has to write, taken now."""
        training = self.training
        folder = temporary_folder(checkpoint_folder(training.run_dir) / f"step-{training.state.step:06d}")
        probe: dict[str, torch.Tensor] = {}
        if outputs:
            module = training.engine.module
            module.eval()
            with averaged(training):  # what the export holds
                probe = training.stage.probe(training.engine.forward)
            module.train()
        captured = self._capture(folder)
        small: dict[str, bytes] = {}
        if dist.is_main():
            try:
                small = {"state.json": json.dumps(training.state.to_dict(), indent=1).encode(), **self._same_always()}
            except OSError as error:
                return partial(_raise, error)
        files = RankFiles(folder, dist.rank(), captured, rng_state(), small, probe if dist.is_main() else {})
        return files.write

    def _capture(self, folder: Path) -> Captured:
        engine = self.training.engine
        save = partial(
            engine.engine.save_checkpoint, str(folder), tag=TAG, client_state={}, save_latest=False,
            exclude_frozen_parameters=bool(frozen_names(engine.module)),
        )  # fmt: skip
        lean = partial(_without_frozen, engine.module)
        with named_if_unwritable(folder):  # DeepSpeed copies what it has offloaded to NVMe at once
            if not self.background:
                return capture(engine.engine, save, lean)
            self.buffers.begin()
            captured = capture(engine.engine, save, lambda state: self.buffers.copy(lean(state)))
            self.buffers.end()
        return captured

    def _same_always(self) -> dict[str, bytes]:
        """Files that are made once and written into every checkpoint."""
        if not self._once:
            training = self.training
            self._once = export_files(training.stage, checkpoint_folder(training.run_dir))
            self._once["recipe.resolved.yaml"] = training.resolved.to_yaml().encode()
        return self._once

    def _complete(self, pending: _Pending, parts: Parts) -> None:
        training, rules = self.training, self.training.recipe.train.checkpoint
        complete(pending.final, training.resolved, dist.world_size(), parts)
        if pending.best:
            mark_best(training.run_dir, pending.final)
        prune(training.run_dir, rules.keep, rules.keep_every_steps)

    def _run(self, work: Callable[[], Any]) -> Future[Timed]:
        """In the background, or at once."""
        if self.background:
            return self._pool.submit(_timed, work)
        done: Future[Timed] = Future()
        try:
            done.set_result(_timed(work))
        except OSError as error:
            done.set_exception(error)
        return done

    def _results(self, pending: _Pending) -> Parts:
        """Wait for all ranks; their parts."""
        parts: Parts = {}
        error, seconds = "", 0.0
        try:
            parts, seconds = pending.work.result()
        except OSError as problem:
            error = str(problem)
        errors, of_ranks, times = zip(*dist.gather_objects((error, parts, seconds)), strict=True)
        problems = list(dict.fromkeys(filter(None, errors)))
        if problems:
            self._fail(pending.final, problems)
        pending.write_seconds += max(times)
        return {name: part for share in of_ranks for name, part in (share or {}).items()}

    def _fail(self, final: Path, problems: list[str]) -> None:
        self._pending = None
        temporary = temporary_folder(final)
        if dist.is_main() and not (temporary / COMPLETE).is_file():
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier()  # no rank may end, and have all others ended, before that
        raise CheckpointError(
            f"checkpoint {final} could not be written: {'; '.join(problems)}. Earlier checkpoints are untouched; free "
            "space or change run_dir, then start the run again: it resumes from the last complete checkpoint"
        )


def _without_frozen(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed 0.19.8 leaves out a frozen weight under its first name only, and a tied output head has two."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.get("module", {}).pop(name, None)
    return state


@contextlib.contextmanager
def _stalled(pending: _Pending) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        pending.stall_seconds += time.monotonic() - began


def _timed(work: Callable[[], Any]) -> Timed:
    began = time.monotonic()
    return work(), time.monotonic() - began


def _raise(error: OSError) -> Parts:
    raise error
