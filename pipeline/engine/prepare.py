"""From a resolved recipe to a run ready for its next step: data, stage, engine, checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.config.schema import Recipe
from pipeline.engine import checkpoint as checkpoints
from pipeline.engine.loaded import check_loaded
from pipeline.engine.phases import Phases
from pipeline.engine.resume import check_frozen_sources, find_resume, restore_best
from pipeline.engine.setup import start_engine
from pipeline.engine.signals import StopFlag
from pipeline.engine.state import TrainState, seed_everything
from pipeline.engine.training import Training
from pipeline.errors import RecipeError
from pipeline.stages.base import AnyStage
from pipeline.stages.data import StageContext, remote
from shards.load.loader import StepLoader, preload_workers
from shards.load.requests import LoaderOptions
from shards.order.plan import Plan

logger = logging.getLogger(__name__)


def prepare(
    resolved: ResolvedRecipe,
    kind: type[AnyStage],
    ranks: dist.Ranks,
    device: torch.device,
    stop: StopFlag,
    phases: Phases,
) -> Training:
    """Plan, model, engine, resume: everything before the first step. All ranks must call.

    Raises:
        RecipeError: the recipe does not fit its data or models.
        CheckpointError: none to resume from, or one that does not fit.
    """
    recipe, run_dir = resolved.recipe, Path(resolved.recipe.run_dir)
    seed_everything(recipe.seed, ranks.rank)
    resume = find_resume(run_dir, resolved)
    if recipe.data.workers:
        preload_workers(kind.__module__)  # while the model is built
    plans = kind.plans(recipe)
    total_steps = steps_of(recipe, plans.train)
    zero_stage = int(resolved.ds_config["zero_optimization"]["stage"])
    sequence = dist.sequence_group(recipe.train.sequence_parallel)
    before = None if resume is None else resume.export_plan()
    context = StageContext(recipe, ranks.rank, ranks.world_size, device, zero_stage, sequence, before)
    stage, engine = start_engine(lambda: kind.build(context, plans), resolved, total_steps)
    check_loaded(stage.module, recipe.model, stage.started_from)
    # from here every process draws differently, but alike in every run of this recipe
    seed_everything(recipe.seed + 1, ranks.rank)
    state = TrainState()
    if resume is not None:
        state = checkpoints.load(engine, resume)
        check_frozen_sources(resume, stage)
        restore_best(run_dir, state)
        logger.info("resumed %s at step %d", resume.path, state.step)
    loader = _loader(context, stage, plans.train, state)
    phases.step, phases.total_steps = state.step, total_steps
    return Training(resolved, ranks, stage, engine, loader, state, total_steps, stop, phases)


def steps_of(recipe: Recipe, plan: Plan) -> int:
    """Optimizer steps of the whole run. Raises RecipeError for less than one."""
    train = recipe.train
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None  # checked when the recipe was loaded
    items = plan.items_per_epoch
    steps = int(items * train.epochs) // train.global_batch
    if steps == 0:
        raise RecipeError(
            f"train.epochs={train.epochs} of {items} items is less than one global batch of "
            f"{train.global_batch}; lower train.global_batch or raise train.epochs"
        )
    return steps


def _loader(context: StageContext, stage: AnyStage, plan: Plan, state: TrainState) -> StepLoader:
    train, data = context.recipe.train, context.recipe.data
    options = LoaderOptions(
        rank=context.data_rank, world_size=context.data_ranks, global_batch=train.global_batch,
        micro_batch=train.micro_batch, workers=data.workers, remote=remote(data),
    )  # fmt: skip
    loader = StepLoader(plan, stage.fetch(train=True), stage.collate(), options)
    if state.step:
        loader.load_state_dict(state.data)
    return loader
