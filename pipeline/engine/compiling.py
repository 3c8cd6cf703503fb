"""torch.compile of a model's layers, or DeepSpeed's compiler for the whole model (DeepCompile, arXiv 2504.09983).

Which combinations of options may be compiled is checked with the recipe (`pipeline.config.deepspeed`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.errors import RecipeError

logger = logging.getLogger(__name__)


def compile_model(engine: Any, how: str, device: torch.device) -> None:
    """Prepares the module of a DeepSpeed engine as `train.compile` says; compilation itself waits for the first calls.

    Raises:
        RecipeError: a way that does not work on this device, or for this model.
    """
    if how == "layers":
        count = compile_layers(engine.module)
        logger.info("torch.compile of %d layers; the first steps take minutes", count)
    elif how == "deepcompile":
        if device.type != "cuda":
            raise RecipeError(
                f"train.compile=deepcompile: DeepSpeed's compiler needs a CUDA device, this is {device.type}; set it to"
                " none or layers"
            )
        engine.compile()
        logger.info("DeepSpeed compiles the model; the first steps take minutes")


def compile_layers(module: nn.Module, backend: str = "inductor") -> int:
    """Compiles the forward pass of every layer (decoder layers, encoder blocks, those of the frame backbone), one by
    one: equal layers share their code, and hooks around a layer stay outside. Returns how many.

    Raises:
        RecipeError: the model has no layers of transformers' kind.
    """
    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise RecipeError("train.compile=layers: the model has no layers of transformers' own kind; set it to none")
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
    return len(layers)
