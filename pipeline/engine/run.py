"""What one rank does from start to exit code."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import dist
from pipeline.config.recipe_file import RecipeFile
from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.durable import named_if_unwritable
from pipeline.engine.faults import as_cluster_error
from pipeline.engine.observers.registry import observers_of
from pipeline.engine.out_of_memory import named_if_out_of_memory
from pipeline.engine.phases import Phases
from pipeline.engine.prepare import prepare
from pipeline.engine.recipe import Guard, Unresolved, file_of_run, read_on_all_ranks
from pipeline.engine.signals import StopFlag
from pipeline.engine.sinks.registry import sinks_of
from pipeline.engine.trainer import Trainer
from pipeline.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, PeerLostError
from pipeline.stages.registry import stage_class
from shards.atomic import write_atomic

logger = logging.getLogger(__name__)


def setup_logging(ranks: dist.Ranks, run_dir: Path) -> None:
    """Rank 0 logs to stderr; every rank to its own file in run_dir/logs."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    form = logging.Formatter(f"%(asctime)s rank={ranks.rank} %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    stream = logging.StreamHandler(sys.stderr)
    stream.setLevel(logging.INFO if ranks.is_main else logging.ERROR)
    file = _RankLog(folder / f"rank-{ranks.rank}.log", encoding="utf-8")
    file.setFormatter(form)
    stream.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[stream, file], force=True)
    # DeepSpeed calls torch.distributed functions by their old names, several times per step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message=".gradient_checkpointing_enable. is deprecated")
    stores = ("fsspec", "s3fs", "botocore", "aiobotocore")
    for noisy in ("DeepSpeed", "deepspeed", "transformers", "torch", "filelock", "PIL", *stores):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _RankLog(logging.FileHandler):
    """The rank's log; on a full disk it says so once, and training goes on until a save reports the cause."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            sys.stderr.write(f"{self.baseFilename} could not be written: {error.strerror}; this log has a gap\n")


@dataclass(frozen=True, slots=True)
class Launcher:
    """What started this rank, and how to reach it."""

    tell: Callable[[dict[str, Any]], bool]
    """Sends it the exit note, which it may be unable to read from the run directory; False if nobody listens."""
    guard: Guard
    """Keeps other runs out of the run directory while rank 0 is inside."""
    phases: Phases = field(default_factory=Phases)
    """What this rank is doing; the launcher is told of it."""


def train(resolved: ResolvedRecipe, ranks: dist.Ranks, stop: StopFlag, phases: Phases) -> tuple[int, str]:
    """Train; returns the exit code and, for a run that was stopped, where it was saved.

    Ends the process group's work on every path.
    """
    recipe, run_dir = resolved.recipe, Path(resolved.recipe.run_dir)
    with named_if_unwritable(run_dir):
        setup_logging(ranks, run_dir)
    with named_if_out_of_memory(resolved, "the start"):
        training = prepare(resolved, stage_class(recipe.stage), ranks, dist.device_for(ranks), stop, phases)
    state = training.state
    with named_if_out_of_memory(resolved, "an evaluation or a save"):
        code = Trainer(training, observers_of(training), sinks_of(training)).fit()
    stopped = "" if code == EXIT_OK else f"saved at step {state.step}"
    if ranks.is_main and stopped:
        logger.info("%s: stopped, %s of %d", recipe.name, stopped, training.total_steps)
    elif ranks.is_main:
        logger.info("%s: %d steps, %s samples", recipe.name, state.step, f"{state.samples_seen:,}")
    dist.barrier()
    return code, stopped


def main(source: RecipeFile | Unresolved, stop: StopFlag, launcher: Launcher) -> int:
    """`train` with every failure turned into an exit code, one paragraph for users, and a note for the supervisor.

    Args:
        source: the launcher's resolved recipe, or a recipe for rank 0 to resolve.
        stop: installed when the process started.
        launcher: what started it.
    """
    rank, code, message, stopped, failed, lost = 0, EXIT_BUG, "", "", False, False
    run_dir = source.run_dir if isinstance(source, RecipeFile) else None
    try:
        rank = dist.ranks_from_environment().rank
        _log_before_training(remarks=rank == 0 and isinstance(source, Unresolved))
        with file_of_run(source, launcher.guard) as file:
            run_dir = file.run_dir
            ranks = dist.init()
            code, stopped = train(read_on_all_ranks(file, ranks), ranks, stop, launcher.phases)
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, "interrupted"
    except Exception as error:
        failure = _named(error)
        code, message, failed = getattr(failure, "exit_code", EXIT_BUG), str(failure), True
        lost = isinstance(failure, PeerLostError)
        if code == EXIT_BUG:
            message = traceback.format_exc()
    note = {"rank": rank, "code": code, "error": message, "stopped": stopped, **_where(launcher.phases)}
    if lost:
        note["consequence"] = True
    launcher_knows = launcher.tell(note)
    if run_dir is not None:
        _leave_exit_note(run_dir, note)
    # the launcher itself reports what it knows, once for all ranks
    if failed and not (launcher_knows and code != EXIT_BUG):
        sys.stderr.write(f"error (rank {rank}): {message}\n")
    if message:
        # other ranks may be inside a collective; a clean shutdown would wait for them
        sys.stderr.flush()
        os._exit(code)
    dist.shutdown()
    return code


def _named(error: Exception) -> Exception:
    """An error of torch that comes from the cluster as one that says so; its traceback goes to the rank's log."""
    found = as_cluster_error(error) if getattr(error, "exit_code", EXIT_BUG) == EXIT_BUG else None
    if found is None:
        return error
    logger.info("before this rank ends with exit code %d:", found.exit_code, exc_info=error)
    return found


def _where(phases: Phases) -> dict[str, Any]:
    """Of the exit note: who ended first, and how far it came."""
    return {"step": phases.step, "host": socket.gethostname(), "time": time.time()}


def _log_before_training(remarks: bool) -> None:
    """Until the logs are open, show only errors, and ``remarks`` on settings on the rank that resolves them."""
    stream = logging.StreamHandler(sys.stderr)
    # on the handler, not the root logger: the command has set our loggers' own level
    stream.setLevel(logging.WARNING if remarks else logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[stream], force=True)


def _leave_exit_note(run_dir: Path, note: dict[str, Any]) -> None:
    """run_dir/logs/exit-rank-N.json, whole or absent: DeepSpeed's launcher turns every failure into 1."""
    path = run_dir / "logs" / f"exit-rank-{note['rank']}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(note))
    except OSError as error:
        sys.stderr.write(f"{path} could not be written: {error.strerror}\n")
