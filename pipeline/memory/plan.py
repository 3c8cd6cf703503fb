"""The memory of one rank of a resolved recipe, item by item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.resolve import ResolvedRecipe
from pipeline.config.schema import Recipe
from pipeline.memory.activations import activation_lines
from pipeline.memory.lines import GIB, Line, peak
from pipeline.memory.parts import Parts, parts_of
from pipeline.memory.zero import ZeroSettings, state_lines

RESERVED_GIB = 2.0
"""Left to the CUDA context, NCCL's channels and gaps between blocks; none of them is a tensor."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Per rank, on its device."""

    lines: tuple[Line, ...]
    gpu_gib: float | None = None
    """Memory of one device; None when nobody said."""

    @property
    def phase(self) -> str:
        """When the rank needs most."""
        return peak(self.lines)[0]

    @property
    def peak_bytes(self) -> int:
        return peak(self.lines)[1]

    @property
    def fits(self) -> bool | None:
        """None without a device to compare with."""
        return None if self.gpu_gib is None else self.peak_bytes <= (self.gpu_gib - RESERVED_GIB) * GIB

    def largest(self, count: int) -> list[Line]:
        """The largest items of the phase that needs most."""
        there = [line for line in self.lines if self.phase in line.phases]
        return sorted(there, key=lambda line: line.bytes, reverse=True)[:count]

    def to_dict(self) -> dict[str, Any]:
        lines = [{**asdict(line), "phases": sorted(line.phases)} for line in self.lines]
        return {"lines": lines, "phase": self.phase, "peak_bytes": self.peak_bytes, "gpu_gib": self.gpu_gib}


def plan_memory(resolved: ResolvedRecipe) -> MemoryPlan:
    """Plan a recipe for its number of ranks. Raises RecipeError when a model's config cannot be read here."""
    recipe = resolved.recipe
    return plan_rank(recipe, resolved.ds_config, resolved.world_size, parts_of(recipe))


def plan_rank(recipe: Recipe, config: Mapping[str, Any], world_size: int, parts: Parts) -> MemoryPlan:
    """Plan one rank.

    Args:
        recipe: what is trained; `deepspeed.gpu_memory_gib` is what it has to fit into.
        config: its complete DeepSpeed configuration.
        world_size: number of ranks.
        parts: its model, `parts_of(recipe)`.
    """
    averages = recipe.train.averaging.kind == "ema"
    states = state_lines(parts.weights(), ZeroSettings.of(config, world_size), averages)
    return MemoryPlan((*states, *activation_lines(recipe, parts)), recipe.deepspeed.gpu_memory_gib)


__all__ = ["RESERVED_GIB", "MemoryPlan", "plan_memory", "plan_rank"]
