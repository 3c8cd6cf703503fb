"""Back to the last good checkpoint within the process, and on with other samples (PaLM, arXiv 2204.02311, section 5.1).

The weights, the optimizer and the step are those of the checkpoint. The data goes on where it is: the samples that
led to the trouble are not seen again. Counts of what has happened go on, too.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from pipeline import dist
from pipeline.engine.checkpoint import (
    Checkpoint,
    damage,
    listed_for_all,
    load,
    open_checkpoint,
    own_folders,
    step_of,
)
from pipeline.engine.resume import restore_best
from pipeline.engine.saving.retention import remove
from pipeline.engine.training import Training
from pipeline.errors import DivergedError

logger = logging.getLogger(__name__)

_GO_ON = ("tokens_seen", "samples_seen", "data", "bad_samples", "skipped_total", "spikes", "rollbacks", "undone_steps")
"""Fields of the state that a rollback leaves alone."""


def roll_back(training: Training, reason: str, trouble_after: int | None = None) -> None:
    """Put a training back to its last good checkpoint. All ranks must call.

    Args:
        reason: what went wrong; a clause that names the step.
        trouble_after: a checkpoint of a later step may hold the trouble, and is taken only if there is no other.

    Raises:
        DivergedError: no rollback is left, or there is nothing to return to.
    """
    state, health = training.state, training.recipe.train.health
    name, left = training.recipe.name, health.max_rollbacks - state.rollbacks
    target = _last_good(training.run_dir, trouble_after) if left > 0 else None
    if target is None:
        raise DivergedError(
            f"{name}: {reason}; lower train.optimizer.lr, lengthen warmup_steps, or check the data. "
            f"{_why_not(training, left)}"
        )
    undone = state.step - target.step
    with training.phases.during("checkpoint"):
        restored = load(training.engine, target)
    for field in dataclasses.fields(state):
        if field.name not in _GO_ON:
            setattr(state, field.name, getattr(restored, field.name))
    state.rollbacks += 1
    state.undone_steps += undone
    _discard_after(training.run_dir, target.step)
    restore_best(training.run_dir, state)
    if dist.is_main():
        logger.warning(
            "%s: %s: ROLLING BACK %d steps to %s, and on with the samples that follow (%d of at most %d rollbacks)",
            name, reason, undone, target.path, state.rollbacks, health.max_rollbacks,
        )  # fmt: skip


def _why_not(training: Training, left: int) -> str:
    limit = training.recipe.train.health.max_rollbacks
    if limit == 0:
        return "The run is not rolled back: train.health.max_rollbacks is 0"
    if left <= 0:
        return f"The run has been rolled back {limit} times, as often as train.health.max_rollbacks allows"
    return (
        f"There is no checkpoint in {training.run_dir} to roll back to, saved while steps were applied; set"
        " train.checkpoint.every_steps or every_minutes"
    )


def _last_good(run_dir: Path, trouble_after: int | None) -> Checkpoint | None:
    """The newest intact checkpoint that was saved neither amid skipped steps nor amid the trouble: those weights may be
    it."""
    newest_first = listed_for_all(own_folders, run_dir)[::-1]
    if trouble_after is not None:
        newest_first.sort(key=lambda folder: step_of(folder) > trouble_after)
    for folder in newest_first:
        problems = damage(folder)
        if problems:
            if dist.is_main():
                logger.error("checkpoint %s is damaged:\n  %s", folder, "\n  ".join(problems))
            continue
        checkpoint = open_checkpoint(folder)
        if checkpoint.state().skipped_steps == 0:
            return checkpoint
    return None


def _discard_after(run_dir: Path, step: int) -> None:
    """Checkpoints of undone steps: a run that resumes would begin there. All ranks must call."""
    if dist.is_main():
        for folder in own_folders(run_dir):
            if step_of(folder) > step:
                remove(folder)
    dist.barrier()
