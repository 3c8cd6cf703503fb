"""Which checkpoint a starting run continues, and whether it is the same experiment."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    complete_folders,
    latest_checkpoint,
    listed_for_all,
)
from pipeline.engine.saving.publish import finish_interrupted, remove_leftovers
from pipeline.engine.saving.retention import mark_best, set_damaged_aside
from pipeline.engine.state import TrainState
from pipeline.errors import CheckpointError
from pipeline.stages.base import AnyStage

logger = logging.getLogger(__name__)

# Fields that may differ between the run that saved and the run that resumes: they change neither the samples of a
# global batch nor the numbers computed from them (micro_batch, chunks and ZeRO stage: up to rounding). Where the shards
# are may change too; the plan's fingerprint checks that they hold the same samples.
FREE_FIELDS = (
    "name", "run_dir", "deepspeed", "data.train", "data.eval", "data.references.scored", "data.workers",
    "data.max_bad_samples",
    "model.attention", "model.kernels", "model.gradient_checkpointing", "train.micro_batch", "train.world_sizes",
    "train.compile", "train.checkpoint", "train.sequence_parallel", "continued_pretraining.loss_chunk_tokens",
    "continued_pretraining.mlp_chunk_tokens", "continued_pretraining.offload_activations", "contrastive.tile_mib",
    "model.visual.backbone.frames_per_pass",
    "train.log_every_steps", "train.eval_every_steps", "train.eval_batches", "train.max_skipped_steps",
    "train.early_stop", "train.health",
    "train.wandb_project", "train.sample_ledger", "train.tensorboard", "train.peak_tflops",
)  # fmt: skip


def find_resume(run_dir: Path, resolved: ResolvedRecipe) -> Checkpoint | None:
    """The checkpoint to continue from by the recipe's `resume` rule, or None to start from step 0.

    All ranks must call: they verify its bytes together. A damaged newest one is set aside by the `damaged` rule.

    Raises:
        CheckpointError: `require` and there is none; `never` and there is one; or it belongs to another experiment.
        DamagedCheckpointError: the newest is damaged and `damaged` is `stop`, or all are.
    """
    rules = resolved.recipe.train.checkpoint
    if dist.is_main():
        finish_interrupted(checkpoint_folder(run_dir))
        remove_leftovers(checkpoint_folder(run_dir))
    dist.barrier()
    complete = listed_for_all(complete_folders, run_dir)
    if complete and rules.resume == "never":
        raise CheckpointError(
            f"train.checkpoint.resume is `never` but {complete[-1]} exists; choose another run_dir or remove it"
        )
    newest = latest_checkpoint(run_dir, rules.damaged)
    if newest is None:
        if rules.resume == "require":
            raise CheckpointError(
                f"train.checkpoint.resume is `require` but {checkpoint_folder(run_dir)} holds no complete checkpoint; "
                "check run_dir, or use `if_present`"
            )
        if complete and dist.is_main():
            logger.error("%s holds no checkpoint that this version reads: STARTING AT STEP 0", run_dir)
        return None
    changes = differences(newest.resolved().recipe.model_dump(), resolved.recipe.model_dump())
    if changes:
        raise CheckpointError(
            f"{newest.path} belongs to another experiment; these fields differ:\n  " + "\n  ".join(changes)
            + "\n  fix: restore them, or choose another run_dir for a new run"
        )  # fmt: skip
    set_damaged_aside(run_dir, newest)
    return newest


def check_frozen_sources(resumed: Checkpoint, stage: AnyStage) -> None:
    """Frozen parts are in no checkpoint: they must still come from the files that the run has loaded so far. All ranks
    must call.

    Raises:
        CheckpointError: on every rank: a file has changed; names it.
    """
    change = ""
    if dist.is_main():
        recorded = resumed.export_plan().get("sources", {})  # none in checkpoints of earlier releases
        change = stage.changed_source(recorded)
    if change := dist.broadcast_object(change):
        raise CheckpointError(
            f"{change}: the run of {resumed.path} would go on with other frozen weights. Put the old files back, or "
            "choose another run_dir for a new run"
        )


def restore_best(run_dir: Path, state: TrainState) -> None:
    """Point `best` at the best checkpoint of the resumed run's own history; only rank 0 acts.

    A run that resumes at an older step repeats later ones: a `best` among those no longer belongs to it.
    """
    if not dist.is_main():
        return
    step = state.best.get("step", 0)
    best = checkpoint_folder(run_dir) / f"step-{step:06d}"
    if best in complete_folders(run_dir):
        mark_best(run_dir, best)
        return
    (checkpoint_folder(run_dir) / "best").unlink(missing_ok=True)
    if step:
        logger.warning("the checkpoint with the best evaluation so far, %s, no longer exists", best)


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """Fields that differ and may not, as ``path: saved -> now``."""
    if path in FREE_FIELDS or saved == now:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        changes = []
        for key in sorted(saved.keys() | now.keys()):
            changes += differences(saved.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        return changes
    return [f"{path}: {saved!r} -> {now!r}"]
