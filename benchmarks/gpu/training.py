"""What the timing sections share: a stage of a recipe on this device, and what it measured.

One process, world size 1, through our own trainer.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from benchmarks.gpu.rows import Probe
from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.observers.base import Observer
from pipeline.engine.training import Training


def resolved_recipe(recipe: str, sets: list[str]) -> ResolvedRecipe:
    """The recipe with its run directory, behind joining the process group."""
    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve

    resolved = resolve(load_recipe(recipe, sets), dist.init().world_size)
    Path(resolved.recipe.run_dir).mkdir(parents=True, exist_ok=True)
    return resolved


def make_training(recipe: str, sets: list[str], probe: Probe) -> Training:
    """A run of the recipe that stands before its first step."""
    from pipeline.engine.prepare import prepare
    from pipeline.engine.signals import StopFlag
    from pipeline.stages.registry import stage_class

    resolved = resolved_recipe(recipe, sets)
    stage, ranks = stage_class(resolved.recipe.stage), dist.ranks_from_environment()
    return prepare(resolved, stage, ranks, torch.device(probe.device, 0), StopFlag())


def fit(training: Training, *observers: Observer) -> None:
    """Train without checkpoints, which would take longer than all that is measured; ``observers`` come first."""
    from pipeline.engine.observers.registry import observers_of
    from pipeline.engine.observers.save import Save
    from pipeline.engine.sinks.registry import sinks_of
    from pipeline.engine.trainer import Trainer

    others = [observer for observer in observers_of(training) if not isinstance(observer, Save)]
    Trainer(training, [*observers, *others], sinks_of(training)).fit()
    training.engine.destroy()


def run_sets(probe: Probe, run_dir: Path, zero: int, steps: int) -> list[str]:
    """Settings that all timed runs have in common."""
    base, overrides = f"zero{zero}", "{}"
    if probe.dry:
        base, overrides = "cpu", f"{{zero_optimization: {{stage: {zero}}}}}"
    return [
        f"run_dir={run_dir}", "data.eval=[]", "train.world_sizes=[1]", "train.precision=bf16", f"train.steps={steps}",
        "train.log_every_steps=1", "train.eval_every_steps=0", "train.tensorboard=false",
        "train.optimizer.warmup_steps=1", "train.checkpoint={every_steps: 0, keep: 1}",
        f"deepspeed.base={base}", f"deepspeed.overrides={overrides}",
    ]  # fmt: skip


def reset_memory(probe: Probe) -> None:
    """Give back what an earlier measurement held, and forget its peak."""
    gc.collect()
    if not probe.dry:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(probe: Probe) -> float | None:
    """Most memory that tensors held since `reset_memory`; None on the CPU."""
    return None if probe.dry else round(torch.cuda.max_memory_allocated() / 2**30, 2)


def synchronise(probe: Probe) -> None:
    if not probe.dry:
        torch.cuda.synchronize()
