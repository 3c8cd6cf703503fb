"""Rules on what a run takes over and when it ends early: `model.init_from`, `train.early_stop`."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.schema import Recipe
from pipeline.config.source import Problem
from pipeline.config.stages import STAGES


def transfer_problems(recipe: Recipe) -> Iterator[Problem]:
    """Parts that the stage's model does not have, and an early stop that nothing could cause."""
    held = parts_of_stage(recipe.stage)
    for part, path in recipe.model.init_from.model_dump().items():
        if path is not None and part not in ("model", *held):
            text = f"model.init_from.{part}: the model of the {recipe.stage} stage has only {', '.join(held)}"
            yield Problem(f"{text}; remove it", (f"model.init_from.{part}", "stage"))
    stop, every = recipe.train.early_stop, recipe.train.eval_every_steps
    if stop is None:
        return
    if not every:
        text = "train.early_stop needs evaluations during training: set train.eval_every_steps and data.eval"
        yield Problem(text, ("train.early_stop", "train.eval_every_steps"))
    if (stop.metric is None) != (stop.direction is None):
        text = "train.early_stop: give metric and direction (min or max) together, or neither for the stage's own"
        yield Problem(text, ("train.early_stop.metric", "train.early_stop.direction"))


def parts_of_stage(stage: str) -> list[str]:
    """Parts of `model.init_from` that the model of a stage has."""
    entry = STAGES[stage]
    parts = [part for part in ("visual", "llm") if part in entry.parts]
    return [*parts, *(["connector"] if len(parts) == 2 else []), *(["heads"] if entry.contrasts else [])]


__all__ = ["parts_of_stage", "transfer_problems"]
