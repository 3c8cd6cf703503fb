"""What recomputed layers keep for the backward pass, in host memory (ALST, arXiv 2506.13996).

With gradient checkpointing a layer keeps its input alone; over a long sequence these inputs are still the largest
thing on the device, [L, D] per layer. They go to pinned memory and come back when backward needs them. All copies
are queued on the device's own stream: the host waits for none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.errors import RecipeError


def offload_layer_inputs(llm: PreTrainedModel) -> None:
    """Layers that recompute (`checkpoint_gradients`) keep their inputs in host memory, from now on.

    Raises:
        RecipeError: the model has no layers that do so.
    """
    layers = [part for part in llm.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise RecipeError(
            f"continued_pretraining.offload_activations: {llm.config.model_type!r} has no layers that transformers"
            " recomputes; set it to false, or use another LLM"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = _recompute_from_host  # type: ignore[assignment]


def _recompute_from_host(layer: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return layer(*inputs)
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):
        # this kind saves its inputs through the hooks; the layer itself runs without a graph, so nothing else is saved
        return checkpoint(layer, *inputs, use_reentrant=True)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    on_device = tensor.device.type != "cpu"
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
    host.copy_(tensor, non_blocking=on_device)
    return tensor.device, host


def _from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, host = packed
    return host.to(device, non_blocking=True)
