"""`slt launch plan` and the memory of one rank: how large a GPU here is, and the planner's table."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from rich.table import Table

from launch.devices import table
from launch.plan import LaunchPlan
from pipeline.config.planner import Answer, NotPlanned, ask, too_large
from pipeline.config.resolve import ResolvedRecipe
from pipeline.errors import RecipeError
from shards.terminal import table_console

log = logging.getLogger(__name__)

_GIB = 1024**3


def detected_gib(devices: Collection[int | str]) -> float | None:
    """Memory of the smallest of these NVIDIA GPUs of this machine (of all, if none has such a number or UUID); None if
    none is listed."""
    rows = table("--query-gpu=index,uuid,memory.total")
    sizes = {(int(row[0]), row[1]): int(row[2]) / 1024 for row in rows if len(row) == 3 and row[2].isdecimal()}
    own = [size for names, size in sizes.items() if not {*names}.isdisjoint(devices)]
    return min(own or sizes.values(), default=None)


def planned_memory(plan: LaunchPlan, resolved: ResolvedRecipe) -> Answer | str:
    """The planner's answer, or why there is none; empty for a recipe that runs on CPUs and names no memory."""
    recipe = resolved.recipe
    if recipe.deepspeed.gpu_memory_gib is None:
        if not plan.needs_gpus and plan.accelerator == "cpu":
            return ""
        found = detected_gib(plan.own_hosts[0].devices) if plan.hostfile is None else None
        section = recipe.deepspeed.model_copy(update={"gpu_memory_gib": found})
        recipe = recipe.model_copy(update={"deepspeed": section})
    try:
        return ask(recipe, plan.world_size)
    except NotPlanned as problem:
        return str(problem)


def check_memory(plan: LaunchPlan, resolved: ResolvedRecipe) -> None:
    """Refuse a launch whose ranks do not fit into their GPUs, if anybody can tell: the recipe or this machine knows
    the GPU's memory, and torch is here. Settings that the memory chose have been planned before.

    Raises:
        RecipeError: the largest items, and the nearest recipes that fit.
    """
    known = resolved.recipe.deepspeed.gpu_memory_gib is not None or (plan.needs_gpus and plan.hostfile is None)
    if resolved.zero_choice or not known:
        return
    answer = planned_memory(plan, resolved)
    if isinstance(answer, Answer) and answer.fits is False:
        raise RecipeError(too_large(answer, plan.world_size))
    if isinstance(answer, str) and answer:
        log.warning("memory is not planned: %s", answer)


def print_memory(answer: Answer, world_size: int) -> None:
    """A table with one row per item, the largest first, and the phases in which it is there."""
    plan = answer.plan
    rows = Table(title=f"memory of one of {world_size} ranks", title_justify="left")
    for name, justify in (("GiB", "right"), ("item", "left"), ("when", "left"), ("rule", "left")):
        rows.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for line in sorted(plan["lines"], key=lambda item: -item["bytes"]):
        rows.add_row(f"{line['bytes'] / _GIB:.2f}", line["item"], _when(line, plan["lines"]), line["rule"])
    rows.add_section()
    rows.add_row(f"{plan['peak_bytes'] / _GIB:.2f}", "peak", plan["phase"], "all items of this phase")
    table_console(highlight=False, markup=False).print(rows)


def _when(line: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    everywhere = max(len(other["phases"]) for other in lines)
    return "always" if len(line["phases"]) == everywhere else ", ".join(line["phases"])


__all__ = ["check_memory", "detected_gib", "planned_memory", "print_memory"]
