"""What is checked of a recipe on the machine that starts it: in about a second, without torch, all problems at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.config.checks import auto_settings, batch_problem
from pipeline.config.inputs import few_texts, input_problems
from pipeline.config.load import LoadedRecipe, load, problem_message
from pipeline.config.planner import Answer, NotPlanned, ask, too_large
from pipeline.config.resolve import ResolvedRecipe
from pipeline.config.room import room_problems
from pipeline.config.schema import Recipe
from pipeline.config.source import Problem, shown_path
from pipeline.errors import RecipeError

log = logging.getLogger(__name__)


def load_with_inputs(path: str | Path, sets: Sequence[str] = ()) -> LoadedRecipe:
    """As `load`; what is wrong with a recipe is told together with what is wrong with its inputs."""
    return load(path, sets, problems_here)


def problems_here(recipe: Recipe) -> Iterator[Problem]:
    """What this machine says of a recipe: its inputs, their fit, the run directory and its disk."""
    yield from input_problems(recipe)
    yield from room_problems(recipe)


def check_recipe(loaded: LoadedRecipe, world_sizes: Iterable[int]) -> None:
    """Refuse a recipe that cannot run on this machine, on so many ranks; a remark is logged.

    Raises:
        RecipeError: lists every problem with the line of its setting.
    """
    recipe = loaded.recipe
    fields = ("train.global_batch", "train.micro_batch")
    batches = [Problem(text, fields) for size in world_sizes if (text := batch_problem(recipe, size))]
    if problems := [*batches, *problems_here(recipe)]:
        raise RecipeError(problem_message(shown_path(loaded.path), problems, loaded.origins))
    if remark := few_texts(recipe):
        log.warning("%s: %s", shown_path(loaded.path), remark)


def check_memory(resolved: ResolvedRecipe) -> Answer | None:
    """Refuse a recipe that does not fit into a GPU whose memory is known; None where nobody can tell.

    Takes seconds and needs torch: only recipes that name `deepspeed.gpu_memory_gib` are planned, and those whose
    settings the memory chose have been.

    Raises:
        RecipeError: the largest items, and the nearest recipes that fit.
    """
    recipe = resolved.recipe
    if recipe.deepspeed.gpu_memory_gib is None or resolved.zero_choice or auto_settings(recipe):
        return None
    try:
        answer = ask(recipe, resolved.world_size)
    except NotPlanned as problem:
        log.warning("memory is not planned: %s", problem)
        return None
    if answer.fits is False:
        raise RecipeError(too_large(answer, resolved.world_size))
    return answer


__all__ = ["check_memory", "check_recipe", "load_with_inputs", "problems_here"]
