"""Which checkpoints of a run stay, and which of them is the best."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline import dist
from pipeline.engine.checkpoint import (
    Checkpoint,
    best_name,
    checkpoint_folder,
    is_foreign,
    own_folders,
    step_of,
    universal_folder,
)
from pipeline.engine.durable import write_durably
from pipeline.engine.saving.publish import COMPLETE, remove_leftovers, replaced_folder


def mark_best(run_dir: Path, checkpoint: Path) -> None:
    """Point `best` at a checkpoint; only rank 0 writes."""
    if dist.is_main():
        write_durably(checkpoint_folder(run_dir) / "best", checkpoint.name)


def prune(run_dir: Path, keep: int, keep_every_steps: int = 0) -> None:
    """Remove all but the newest ``keep`` checkpoints, those of every ``keep_every_steps`` (0 = none) and the best one.

    Only rank 0 acts. Checkpoints of another format version do not count and stay.
    """
    if not dist.is_main():
        return
    folder, best = checkpoint_folder(run_dir), best_name(run_dir)
    for old in own_folders(run_dir)[:-keep]:
        every = keep_every_steps and step_of(old) % keep_every_steps == 0
        if old.name != best and not every:
            remove(old)
    remove_leftovers(folder)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint and its copy for other programs; only one rank may call.

    It loses its name first: what a crash leaves of it is no checkpoint, and `remove_leftovers` finds it.
    """
    shutil.rmtree(universal_folder(checkpoint), ignore_errors=True)
    nameless = replaced_folder(checkpoint)
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(checkpoint, nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def set_damaged_aside(run_dir: Path, resumed: Checkpoint) -> None:
    """Rename checkpoints newer than the resumed one; only rank 0 acts.

    They were skipped because they are damaged. Under their own names they would count among the newest ones that
    `prune` keeps, in place of intact ones.
    """
    if not dist.is_main():
        return
    for path in own_folders(run_dir):
        if step_of(path) > resumed.step:
            _set_aside(path, "damaged")


def set_foreign_aside(path: Path) -> None:
    """Rename a checkpoint of another format version whose name is needed; only one rank may call."""
    if (path / COMPLETE).is_file() and is_foreign(path):
        _set_aside(path, "foreign")


def _set_aside(path: Path, why: str) -> None:
    names = (path.with_name(f"{why}-{path.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 99))))
    path.rename(next(name for name in names if not name.exists()))
