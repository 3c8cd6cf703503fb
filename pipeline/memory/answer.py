"""One question on stdin, one answer on stdout, both JSON: `pipeline.config.planner` asks."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from typing import Any

from pipeline.config.schema import Recipe
from pipeline.errors import SltError


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The plan of a recipe and what would make it fit."""
    from pipeline.memory.search import choose

    recipe = Recipe.model_validate_json(json.dumps(question["recipe"]))
    try:
        choice = choose(recipe, question["world_size"])
    except SltError as error:
        return {"problem": str(error)}
    plan = choice.plan
    return {
        "base": choice.base, "recompute": choice.recompute, "reason": choice.reason, "plan": plan.to_dict(),
        "fits": plan.fits, "fixes": choice.fixes,
    }  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin))) + "\n")


__all__ = ["answer", "main"]
