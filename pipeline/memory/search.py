"""The smallest ZeRO stage that fits, and the nearest recipe that does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.checks import batch_problem
from pipeline.config.deepspeed import ds_config
from pipeline.config.resolve import accumulation_steps, with_settings
from pipeline.config.schema import AUTO, TILE_MIB, Recipe
from pipeline.config.stages import STAGES
from pipeline.memory.activations import frames_per_pass, how_recomputed
from pipeline.memory.lines import GIB
from pipeline.memory.parts import Parts, parts_of
from pipeline.memory.plan import RESERVED_GIB, MemoryPlan, plan_rank
from pipeline.models.recompute import share_of

BASES = ("zero1", "zero2", "zero3", "zero3_offload")
"""By what they cost in communication: the first that fits is the fastest."""
MOST_CHANGES = 3
_SHOWN = 4
_SHARES = (0.25, 0.5, 0.75, True)  # of the layers, recomputed


@dataclass(frozen=True, slots=True)
class Choice:
    """What to run with."""

    base: str
    recompute: bool | float
    """`model.gradient_checkpointing`."""
    reason: str
    plan: MemoryPlan
    fixes: list[str]
    """Of a plan that does not fit: changes after which it does."""


def choose(recipe: Recipe, world_size: int) -> Choice:
    """The recipe's own base and share of recomputed layers, or where they are `auto` the first of `_candidates` that
    fits; if nothing fits, the last one and how to make it fit.

    Raises:
        RecipeError: a model's config cannot be read here.
    """
    parts = parts_of(recipe)
    needs: dict[str, str] = {}
    for base, share in _candidates(recipe, world_size, parts):
        changed = with_settings(recipe, {"deepspeed.base": base, "model.gradient_checkpointing": share})
        plan = plan_of(changed, world_size, parts)
        if plan.fits is not False:
            how = f", {how_recomputed(share)}" if recipe.model.gradient_checkpointing == AUTO else ""
            return Choice(base, share, _reason(f"{base}{how}", plan, needs), plan, [])
        needs[base] = f"{base} would need {plan.peak_bytes / GIB:.1f} GiB"  # the least, as shares grow
    reason = f"{', '.join(needs.values())} of {plan.gpu_gib:g} GiB ({RESERVED_GIB:g} GiB stay free)"
    return Choice(base, share, reason, plan, list(_fixes(changed, world_size, parts)))


def _candidates(recipe: Recipe, world_size: int, parts: Parts) -> list[tuple[str, bool | float]]:
    """(base, share of recomputed layers) by what they cost: a higher ZeRO stage little, layers that are computed twice
    more, and an optimizer on the CPU most."""
    bases: Sequence[str] = (recipe.deepspeed.base,)
    if recipe.deepspeed.base == AUTO:
        bases = [name for name in BASES if _runs(with_settings(recipe, {"deepspeed.base": name}), world_size, parts)]
    own = recipe.model.gradient_checkpointing
    shares: Sequence[bool | float] = (False, *_SHARES) if isinstance(own, str) else (own,)
    fast = [base for base in bases if base != BASES[-1]]
    offloaded = [base for base in bases if base == BASES[-1]]
    return [(base, share) for group in (fast, offloaded) for share in shares for base in group]


def _reason(how: str, plan: MemoryPlan, needs: dict[str, str]) -> str:
    of = "" if plan.gpu_gib is None else f" of {plan.gpu_gib:g} GiB ({RESERVED_GIB:g} GiB stay free)"
    others = f"; {', '.join(needs.values())}" if needs else ""
    return f"{how}: {plan.peak_bytes / GIB:.1f} GiB{of}, most in {plan.phase}{others}"


def plan_of(recipe: Recipe, world_size: int, parts: Parts) -> MemoryPlan:
    """Plan with the base the recipe names."""
    config = ds_config(recipe, world_size, accumulation_steps(recipe, world_size))
    return plan_rank(recipe, config, world_size, parts)


# -- the nearest recipe that fits --------------------------------------------------------------------------------
def _fixes(recipe: Recipe, world_size: int, parts: Parts) -> Iterator[str]:
    """Fewest changes first, then those that cost least speed; all of the smallest number of changes, up to four."""
    options = list(_options(recipe, world_size))
    for count in range(1, MOST_CHANGES + 1):
        found = list(_fitting(recipe, itertools.combinations(options, count), world_size, parts))
        if found:
            yield from (", ".join(f"{name}={_shown(value)}" for name, value in change.items()) for change in found)
            return


def _fitting(recipe: Recipe, groups: Any, world_size: int, parts: Parts) -> Iterator[dict[str, Any]]:
    found = 0
    for group in groups:
        names = [name for name, _ in group]
        for values in itertools.product(*(values for _, values in group)):
            change = dict(zip(names, values, strict=True))
            candidate = with_settings(recipe, change)
            if not _runs(candidate, world_size, parts) or not plan_of(candidate, world_size, parts).fits:
                continue
            yield change
            found += 1
            break
        if found == _SHOWN:
            return


def _runs(recipe: Recipe, world_size: int, parts: Parts) -> bool:
    """Ranks cannot call a sharded backbone differently often, as `pipeline.stages.video.check_passes` says."""
    if world_size == 1 or recipe.stage == "continued_pretraining" or not frames_per_pass(recipe, parts):
        return True
    config = ds_config(recipe, world_size, accumulation_steps(recipe, world_size))
    return bool(config["zero_optimization"]["stage"] != 3)


def _options(recipe: Recipe, world_size: int) -> Iterator[tuple[str, list[Any]]]:
    """(setting, its other values from the nearest) in the order in which they cost speed."""
    model, train = recipe.model, recipe.train
    if recipe.stage == "contrastive":
        yield "contrastive.tile_mib", _smaller(recipe.contrastive.tile_mib or TILE_MIB["cuda"])
    elif recipe.stage == "continued_pretraining":
        yield "continued_pretraining.loss_chunk_tokens", _smaller(recipe.continued_pretraining.loss_chunk_tokens)[:2]
    if shares := [share for share in _SHARES if share > share_of(model)]:
        yield "model.gradient_checkpointing", shares
    if model.visual is not None and model.visual.backbone is not None and recipe.stage != "continued_pretraining":
        most = train.micro_batch * recipe.data.max_frames
        yield "model.visual.backbone.frames_per_pass", _smaller(model.visual.backbone.frames_per_pass or most)
    base = recipe.deepspeed.base
    if base in BASES:
        yield "deepspeed.base", list(BASES[BASES.index(base) + 1 :])
    elif base == AUTO:
        yield "deepspeed.base", [BASES[-1]]
    smaller = (with_settings(recipe, {"train.micro_batch": size}) for size in range(train.micro_batch - 1, 0, -1))
    yield "train.micro_batch", [found.train.micro_batch for found in smaller if not batch_problem(found, world_size)]
    if STAGES[recipe.stage].translates:
        yield "connector.num_beams", list(range(recipe.connector.num_beams - 1, 0, -1))
    if recipe.stage != "continued_pretraining":
        yield "data.max_frames", _smaller(recipe.data.max_frames)[:2]
        yield "data.image_pixels", []


def _smaller(value: int) -> list[int]:
    """Halves of a number, at most five."""
    halves = [value // 2**power for power in range(1, 6)]
    return [half for half in halves if half > 0]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


__all__ = ["BASES", "Choice", "choose", "plan_of"]
