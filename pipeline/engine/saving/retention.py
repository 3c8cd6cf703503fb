"""Which checkpoints of a run stay, and which of them is the best."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline import dist
from pipeline.engine.checkpoint import Checkpoint, best_name, checkpoint_folder, complete_folders, universal_folder
from pipeline.engine.durable import write_durably
from pipeline.engine.saving.publish import COMPLETE, remove_leftovers


def mark_best(run_dir: Path, checkpoint: Path) -> None:
    """Point `best` at a checkpoint; only rank 0 writes."""
    if dist.is_main():
        write_durably(checkpoint_folder(run_dir) / "best", checkpoint.name)


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best one; only rank 0 acts."""
    if not dist.is_main():
        return
    folder, best = checkpoint_folder(run_dir), best_name(run_dir)
    for old in complete_folders(run_dir)[:-keep]:
        if old.name != best:
            (old / COMPLETE).unlink()  # no longer a checkpoint, before its parts go
            shutil.rmtree(old)
            shutil.rmtree(universal_folder(old), ignore_errors=True)
    remove_leftovers(folder)


def set_damaged_aside(run_dir: Path, resumed: Checkpoint) -> None:
    """Rename checkpoints newer than the resumed one; only rank 0 acts.

    They were skipped because they are damaged. Under their own names they would count among the newest ones that
    `prune` keeps, in place of intact ones.
    """
    if not dist.is_main():
        return
    for path in complete_folders(run_dir):
        if int(path.name.removeprefix("step-")) > resumed.step:
            names = (
                path.with_name(f"damaged-{path.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 99)))
            )
            path.rename(next(name for name in names if not name.exists()))
