"""What of a model trains: the stage's own plan, changed part by part by `train.parts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pipeline.config.parts_schema import BACKBONE, PartConfig, part_of
from pipeline.errors import RecipeError
from pipeline.models.lora import LoraLinear, add_lora, linear_layers, matching, record_adapters


def apply_parts(
    module: nn.Module, plan: Mapping[str, bool], parts: Mapping[str, PartConfig], unreached: Sequence[str] = ()
) -> None:
    """Add adapters and set requires_grad of every parameter.

    Args:
        module: its parameters' names begin with the names of parts.
        plan: top-level part -> whether the stage trains it. What is frozen already (a frozen backbone) stays frozen.
        parts: `train.parts`; a backbone that is frozen already trains only if a path inside it says so.
        unreached: paths whose outputs the stage's loss does not read; they never train.

    Raises:
        RecipeError: a path names nothing, or only what the stage does not reach; there is no layer for adapters.
    """
    names = [name for name, _ in module.named_parameters()]
    _check_paths(names, parts, unreached)
    for path, part in parts.items():
        if part.mode == "lora":
            _adapt(module, path, parts, unreached)
    record_adapters(module)
    for name, parameter in module.named_parameters():
        path = part_of(name, parts)
        if part_of(name, unreached):
            trains = False
        elif not path:
            trains = plan[name.split(".")[0]] and parameter.requires_grad
        elif parts[path].mode == "lora":
            trains = ".lora_" in name
        else:
            may = parameter.requires_grad or path.startswith(BACKBONE)
            trains = parts[path].mode == "trained" and may
        parameter.requires_grad_(trains)


def _check_paths(names: Sequence[str], parts: Mapping[str, PartConfig], unreached: Sequence[str]) -> None:
    for path, part in parts.items():
        named = [name for name in names if part_of(name, [path])]
        if not named:
            raise RecipeError(f"train.parts.{path}: the model has no such part; it has {', '.join(_known(names))}")
        if part.mode != "frozen" and all(part_of(name, unreached) for name in named):
            raise RecipeError(
                f"train.parts.{path}.mode={part.mode}: this stage does not read what {path} computes, so it would get"
                " no gradient; leave it out"
            )


def _known(names: Sequence[str]) -> list[str]:
    """Paths to choose from: top-level parts, and the levels of the visual encoder."""
    found: dict[str, None] = {}
    for name in names:
        words = name.split(".")
        found[words[0]] = None
        if words[0] == "visual":
            found[f"visual.{words[1].split('_')[0]}"] = None
    return list(found)


def _adapt(module: nn.Module, path: str, parts: Mapping[str, PartConfig], unreached: Sequence[str]) -> None:
    part = parts[path]
    layers = [name for name in linear_layers(module) if part_of(name, parts) == path and not part_of(name, unreached)]
    if not layers:
        raise RecipeError(
            f"train.parts.{path}.mode=lora: {path} has no linear layer (torch.nn.Linear) that adapters fit; use"
            " mode: trained or frozen"
        )
    wanted = matching(layers, part.lora_targets)
    if not wanted:
        ends = sorted({name.rpartition(".")[2] for name in layers})
        raise RecipeError(
            f"train.parts.{path}.lora_targets={part.lora_targets} name none of its {len(layers)} linear layers; they"
            f" are called {', '.join(ends)}"
        )
    there = {name: layer for name in wanted if isinstance(layer := module.get_submodule(name), LoraLinear)}
    for name, layer in there.items():
        if (layer.rank, layer.alpha) != (part.lora_rank, part.lora_alpha):
            raise RecipeError(
                f"train.parts.{path}: {name} already has an adapter of rank {layer.rank} and alpha {layer.alpha:g}, the"
                f" recipe says {part.lora_rank} and {part.lora_alpha:g}; set these, or export the model with"
                " --lora merge first"
            )
    add_lora(module, [name for name in wanted if name not in there], part.lora_rank, part.lora_alpha)


__all__ = ["apply_parts"]
