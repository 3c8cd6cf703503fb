"""What one rank does from start to exit code."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import dist
from pipeline.config.inputs import check_inputs
from pipeline.config.load import LoadedRecipe, load
from pipeline.config.resolve import ResolvedRecipe, resolve_loaded, write_atomic, write_resolved
from pipeline.engine.durable import named_if_unwritable
from pipeline.engine.observers.registry import observers_of
from pipeline.engine.prepare import prepare
from pipeline.engine.signals import StopFlag
from pipeline.engine.sinks.registry import sinks_of
from pipeline.engine.trainer import Trainer
from pipeline.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK
from pipeline.stages.registry import STAGES

logger = logging.getLogger(__name__)


def setup_logging(ranks: dist.Ranks, run_dir: Path) -> None:
    """Rank 0 speaks on stderr; every rank keeps its own file in run_dir/logs."""
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
    """The rank's own log; on a full disk it says so once and training goes on to where the cause is told."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            sys.stderr.write(f"{self.baseFilename} could not be written: {error.strerror}; this log has a gap\n")


@dataclass(frozen=True, slots=True)
class Launcher:
    """What started this rank, and how to deal with it."""

    tell: Callable[[dict[str, Any]], None]
    """Takes the exit note to it, which may be unable to read it from the run directory."""
    guard: Callable[[Path], AbstractContextManager[None]]
    """Keeps other runs out of the run directory while rank 0 is inside."""


def train(loaded: LoadedRecipe, sets: list[str], stop: StopFlag, launcher: Launcher) -> tuple[int, str]:
    """Resolve and train; returns the exit code and, for a run that was stopped, where it was saved.

    Ends the process group's work on every path.
    """
    ranks = dist.init()
    resolved = resolve_loaded(loaded, ranks.world_size, sets)
    run_dir = Path(resolved.recipe.run_dir)
    with launcher.guard(run_dir) if ranks.is_main else nullcontext():
        return _train(resolved, ranks, stop)


def _train(resolved: ResolvedRecipe, ranks: dist.Ranks, stop: StopFlag) -> tuple[int, str]:
    recipe, run_dir = resolved.recipe, Path(resolved.recipe.run_dir)
    with named_if_unwritable(run_dir):
        setup_logging(ranks, run_dir)
        if ranks.is_main:
            write_resolved(resolved, run_dir)
    training = prepare(resolved, STAGES[recipe.stage], ranks, dist.device_for(ranks), stop)
    code, state = Trainer(training, observers_of(training), sinks_of(training)).fit(), training.state
    stopped = "" if code == EXIT_OK else f"saved at step {state.step}"
    if ranks.is_main and stopped:
        logger.info("%s: stopped, %s of %d", recipe.name, stopped, training.total_steps)
    elif ranks.is_main:
        logger.info("%s: %d steps, %s samples", recipe.name, state.step, f"{state.samples_seen:,}")
    dist.barrier()
    return code, stopped


def main(recipe_path: str, sets: list[str], stop: StopFlag, launcher: Launcher) -> int:
    """`train` with every failure turned into an exit code, one paragraph for users, and a note for the supervisor.

    Args:
        recipe_path: recipe YAML or the name of one of ours.
        sets: overrides, ``a.b=c``.
        stop: installed when the process started.
        launcher: what started it.
    """
    code, message, stopped, run_dir, failed = EXIT_BUG, "", "", None, False
    try:
        loaded = _read(recipe_path, sets)
        run_dir = Path(loaded.recipe.run_dir)
        check_inputs(loaded)
        code, stopped = train(loaded, sets, stop, launcher)
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, "interrupted"
    except Exception as error:
        code, message, failed = getattr(error, "exit_code", EXIT_BUG), str(error), True
        if code == EXIT_BUG:
            message = traceback.format_exc()
    rank = dist.ranks_from_environment().rank
    note = {"rank": rank, "code": code, "error": message, "stopped": stopped}
    launcher.tell(note)
    if run_dir is not None:
        _leave_exit_note(run_dir, note)
    # what a launcher knows it tells itself, once for all ranks
    if failed and not (run_dir is not None and code != EXIT_BUG and dist.is_launched()):
        sys.stderr.write(f"error (rank {rank}): {message}\n")
    if message:
        # other ranks may sit in a collective; a polite shutdown would wait for them
        sys.stderr.flush()
        os._exit(code)
    dist.shutdown()
    return code


def _read(recipe_path: str, sets: list[str]) -> LoadedRecipe:
    """The recipe. What it remarks on settings is told by rank 0 alone, or has been told by the launcher."""
    quiet = dist.is_launched() or not dist.ranks_from_environment().is_main
    stream = logging.StreamHandler(sys.stderr)
    # of the handler, not of the root: the command has given our loggers a level of their own
    stream.setLevel(logging.ERROR if quiet else logging.WARNING)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[stream], force=True)
    return load(recipe_path, sets)


def _leave_exit_note(run_dir: Path, note: dict[str, Any]) -> None:
    """run_dir/logs/exit-rank-N.json, whole or absent: DeepSpeed's launcher turns every failure into 1."""
    path = run_dir / "logs" / f"exit-rank-{note['rank']}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(note))
    except OSError as error:
        sys.stderr.write(f"{path} could not be written: {error.strerror}\n")
