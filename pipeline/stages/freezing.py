"""Which parts of a model train, which stay frozen, and which layers a model may not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pipeline.config.parts_schema import PartConfig, part_of
from pipeline.errors import RecipeError
from pipeline.models.parts import apply_parts


def apply_freeze_plan(
    module: nn.Module,
    plan: dict[str, bool],
    parts: Mapping[str, PartConfig] | None = None,
    unreached: Sequence[str] = (),
) -> list[str]:
    """`apply_parts`, and the names of the parameters that train.

    Raises:
        RecipeError: as there; nothing is left to train.
    """
    apply_parts(module, plan, parts or {}, unreached)
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise RecipeError(f"the freeze plan {plan} leaves no parameter to train")
    return trainable


def check_held(module: nn.Module, parts: Mapping[str, PartConfig], sources: Sequence[str]) -> None:
    """Refuse to freeze what no folder holds: checkpoints and exports would leave it out for good.

    Args:
        module: frozen as planned.
        parts: what the recipe says of them; parts that a stage freezes by itself come from folders.
        sources: beginnings of the names of parameters that come from a folder (`source_prefixes`).

    Raises:
        RecipeError: names the first of them.
    """
    for name in frozen_names(module):
        path = part_of(name, parts)
        if path and not name.startswith(tuple(sources)):
            raise RecipeError(
                f"train.parts.{path}.mode={parts[path].mode} leaves {name} as it is, but its weights are new and in no"
                " folder, so no checkpoint and no export would hold them; train it, or name a folder (model.init_from)"
            )


def check_layers(module: nn.Module) -> None:
    """Refuse layers whose output for one sample depends on other samples: the loss would change with the micro-batch
    and the number of ranks. Fixed statistics, as in a frozen part, are fine.

    Raises:
        RecipeError: a batch normalisation (or its kind) that would use the statistics of the batch.
    """
    module.train()  # frozen parts stay in eval mode by themselves
    mixing = [
        name
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm | _InstanceNorm)
        and (part.training or part.running_mean is None)
        and (isinstance(part, _BatchNorm) or part.track_running_stats)
    ]
    if not mixing:
        return
    layer = module.get_submodule(mixing[0])
    fix = "take a model with layer norms, such as a ViT or ConvNeXt"
    if layer.training and mixing[0].startswith("visual."):
        fix = f"freeze the part (model.visual.backbone.train: frozen), so that it uses its stored statistics, or {fix}"
    elif not layer.training:
        fix = f"it is frozen, but stores no statistics to use instead; {fix}"
    raise RecipeError(
        f"{len(mixing)} layers mix the samples of a micro-batch, the first is {mixing[0]} ({type(layer).__name__}):"
        f" losses would depend on train.micro_batch and the number of ranks. Fix: {fix}."
    )


def frozen_names(module: nn.Module) -> list[str]:
    """Names of frozen parameters, which a checkpoint leaves out."""
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


def frozen_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Saved buffers of modules that train nothing, such as the statistics of a frozen batch normalisation."""
    buffers = []
    for prefix, owner in module.named_modules():
        if any(parameter.requires_grad for parameter in owner.parameters(recurse=False)):
            continue
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                buffers.append((f"{prefix}.{name}", buffer))
    return buffers
