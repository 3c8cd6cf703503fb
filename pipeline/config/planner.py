"""Asks `pipeline.memory` in a process of its own: it needs torch, which recipes and launches must not import."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.pretrained import missing_part
from pipeline.config.schema import Recipe
from pipeline.errors import RecipeError

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from pipeline.memory.answer import main; main()"
_SECONDS = 600.0  # two imports and a few models without data; a cold network disk takes minutes


@dataclass(frozen=True, slots=True)
class Answer:
    """What the planner says about a recipe."""

    base: str
    """The first base of `pipeline.memory.search.BASES` that fits, or the recipe's own."""
    reason: str
    """One sentence for the log and the resolved recipe."""
    plan: dict[str, Any]
    """`pipeline.memory.plan.MemoryPlan.to_dict` of that base."""
    fits: bool | None
    """None without a `deepspeed.gpu_memory_gib` to compare with."""
    fixes: tuple[str, ...] = ()
    """For a recipe that does not fit: changes after which it does, nearest first."""
    recompute: bool | float = False
    """`model.gradient_checkpointing`, the recipe's own or the smallest share that fits."""


class NotPlanned(RecipeError):
    """No plan can be made here: a config is missing, or torch is."""


def ask(recipe: Recipe, world_size: int) -> Answer:
    """The memory of one rank of this recipe, and what its `auto` settings become.

    Raises:
        NotPlanned: a model's config, or torch, is not on this machine.
    """
    if missing := missing_part(recipe):
        raise NotPlanned(missing)
    return _asked(json.dumps({"recipe": recipe.model_dump(mode="json"), "world_size": world_size}))


@functools.lru_cache(maxsize=8)
def _asked(question: str) -> Answer:
    argv = [sys.executable, "-c", _PROGRAM, str(_ROOT)]
    try:
        done = subprocess.run(
            argv, input=question, capture_output=True, text=True, timeout=_SECONDS, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise NotPlanned(f"the memory planner did not answer within {_SECONDS:g} s") from error
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise NotPlanned(f"the memory planner cannot run here: {last}")
    answer = json.loads(lines[-1])
    if "problem" in answer:
        raise NotPlanned(answer["problem"])
    return Answer(**{**answer, "fixes": tuple(answer["fixes"])})


def too_large(answer: Answer, world_size: int) -> str:
    """Why a recipe does not fit, its largest items, and what would."""
    plan, gib = answer.plan, 1024**3
    there = [line for line in plan["lines"] if plan["phase"] in line["phases"]]
    there.sort(key=lambda line: -line["bytes"])
    largest = ", ".join(f"{line['item']} {line['bytes'] / gib:.1f} GiB" for line in there[:3])
    nearest = "The nearest recipes that do:" + "".join(f"\n  {fix}" for fix in answer.fixes)
    if not answer.fixes:
        nearest = "No change of up to three settings makes it fit; use a smaller model, or more memory"
    return (
        f"a rank of {world_size} does not fit into its GPU: {answer.reason}, most in {plan['phase']}: {largest}."
        f" {nearest}"
    )


__all__ = ["Answer", "NotPlanned", "ask", "too_large"]
