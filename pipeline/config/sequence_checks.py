"""Rules on sequence-level tuning: there is something to gain."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.schema import Recipe
from pipeline.config.source import Problem


def sequence_problems(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with `sequence_tuning`."""
    config, start = recipe.sequence_tuning, recipe.model.init_from
    if recipe.stage != "sequence_tuning":
        return
    if start.connector is None and start.model is None:
        text = (
            "model.init_from.connector is missing: a new connector writes nothing that a reward could tell apart; name"
        )
        yield Problem(f"{text} an export of stage 3 (or of this stage)", ("model.init_from", "stage"))
    if not config.bleu_weight and not config.rouge_l_weight:
        names = ("sequence_tuning.bleu_weight", "sequence_tuning.rouge_l_weight")
        yield Problem(f"{' and '.join(names)} are both 0: every translation has the reward 0; raise one", names)


__all__ = ["sequence_problems"]
