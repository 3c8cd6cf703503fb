"""Layers whose activations are computed again in the backward pass instead of being kept (arXiv 1604.06174)."""

from __future__ import annotations

import math

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.config.schema import ModelConfig
from pipeline.errors import RecipeError


def share_of(model: ModelConfig) -> float:
    """`model.gradient_checkpointing` of a resolved recipe, from 0 to 1."""
    share = model.gradient_checkpointing
    assert not isinstance(share, str), "resolving a recipe replaces auto"
    return float(share)


def checkpoint_gradients(model: PreTrainedModel, share: float) -> None:
    """Recompute the first ``share`` (0 to 1, rounded up to whole layers) of every stack of layers in the model, and
    keep the activations of the others, which then cost no second forward pass.

    Raises:
        RecipeError: a part of the layers, in a model whose layers transformers cannot choose among.
    """
    stacks = layer_stacks(model)
    if 0 < share < 1 and not stacks:
        raise RecipeError(
            f"model.gradient_checkpointing={share}: {model.config.model_type!r} recomputes all of its layers or none;"
            " set it to true or false"
        )
    if share:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for stack in stacks:
        for layer in stack[recomputed_layers(len(stack), share) :]:
            layer.gradient_checkpointing = False


def layer_stacks(model: PreTrainedModel) -> list[list[GradientCheckpointingLayer]]:
    """The model's layers that transformers can recompute, those of one stack together and in their order."""
    children = ([child for child in part.children()] for part in model.modules())
    stacks = ([layer for layer in part if isinstance(layer, GradientCheckpointingLayer)] for part in children)
    return [stack for stack in stacks if stack]


def recomputed_layers(layers: int, share: float) -> int:
    """How many of a stack's layers are recomputed."""
    return math.ceil(layers * float(share))
