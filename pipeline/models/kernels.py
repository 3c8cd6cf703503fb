"""Fused Triton kernels of liger-kernel: norms, feed-forward blocks, rotary positions and the token loss.

They compute what the model's own code computes, in fewer passes over memory. Names, weights and configs of the model
stay as they are, and so do checkpoints and exports.

Only the given model is changed. liger-kernel by itself also replaces classes and functions inside transformers, for all
models of the family made later, on any device; here these replacements are undone, except for the rotary positions,
which no model holds: those look at the device of their tensors.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from pipeline.errors import RecipeError
from pipeline.losses import Backend

log = logging.getLogger(__name__)

FAMILIES = {
    "gemma": "gelu_pytorch_tanh",
    "gemma2": "gelu_pytorch_tanh",
    "gemma3_text": "gelu_pytorch_tanh",
    "llama": "silu",
    "mistral": "silu",
    "olmo2": "silu",
    "phi3": "silu",
    "qwen2": "silu",
    "qwen3": "silu",
    "smollm3": "silu",
}
"""Model families whose layers are replaced -> the activation that the fused feed-forward block computes."""


class Kernels(NamedTuple):
    """What computes the parts of a language model."""

    layers: Backend
    """Norms, feed-forward blocks and rotary positions."""
    loss: Backend
    """The chunks of the token loss."""


def choose(name: str, llm: PreTrainedModel, device: torch.device | str) -> Kernels:
    """The kernels for a language model on ``device``, logged with the reasons against fused ones.

    Args:
        name: `liger`, `torch`, or `auto` for `liger` where it works. The loss fits every family, the layers do not.

    Raises:
        RecipeError: `liger` is forced and does not work here, or not for this model.
    """
    if name == "torch":
        log.info("fused kernels: none (the recipe's choice)")
        return Kernels("torch", "torch")
    here, model = _obstacle(torch.device(device), forced=name == "liger"), _obstacle_of(llm)
    if name == "liger" and (problem := here or model):
        raise RecipeError(f"model.kernels: liger cannot be used: {problem}. Use auto or torch.")
    chosen = Kernels("torch" if here or model else "liger", "torch" if here else "liger")
    log.info(
        "fused kernels: layers %s, token loss %s (%s)%s",
        *chosen, "forced by the recipe" if name == "liger" else name, f"; {here or model}" if here or model else "",
    )  # fmt: skip
    return chosen


def _obstacle(device: torch.device, forced: bool) -> str | None:
    """Why Triton kernels cannot run here, or None. Triton's interpreter is slow, so it runs them only where forced."""
    try:
        kernel = importlib.import_module("liger_kernel.ops.cross_entropy").liger_cross_entropy_kernel
    except ImportError as error:
        return f"liger-kernel cannot be imported ({error}); pip install 'llava-slt[gpu]'"
    if device.type == "cuda" or (forced and _is_interpreted(kernel)):
        return None
    return f"its kernels need a CUDA device, this is {device.type}"


def _is_interpreted(kernel: Any) -> bool:
    """Whether Triton runs without a device (TRITON_INTERPRET=1, for tests)."""
    return type(kernel).__name__ == "InterpretedFunction"


def _obstacle_of(llm: PreTrainedModel) -> str | None:
    """Why the layers of this model cannot be replaced, or None."""
    config, family = llm.config, llm.config.model_type
    if family not in FAMILIES or not type(llm).__module__.startswith("transformers."):
        return f"no fused layers are known for {family!r} ({type(llm).__name__}); known: {', '.join(FAMILIES)}"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != FAMILIES[family]:
        return f"its feed-forward blocks use {activation}, the fused ones of {family} compute {FAMILIES[family]}"
    return None


def fuse_layers(llm: PreTrainedModel) -> None:
    """Replaces the layers of a model for which `choose` returned `liger`; call it once, before training."""
    assert llm.config.model_type in FAMILIES
    patching = importlib.import_module("liger_kernel.transformers.monkey_patch")
    apply = patching.MODEL_TYPE_TO_APPLY_LIGER_FN[llm.config.model_type]
    modeling: Any = sys.modules[type(llm).__module__]
    before = dict(vars(modeling))
    wanted = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
    rest = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    parameters = inspect.signature(apply).parameters
    apply(model=llm, **{name: value for name, value in (wanted | rest).items() if name in parameters})
    fused = modeling.apply_rotary_pos_emb
    for name, value in before.items():
        setattr(modeling, name, value)
    original = before["apply_rotary_pos_emb"]
    if not isinstance(original, _RotaryPositions):
        kernel = importlib.import_module("liger_kernel.ops.rope")._triton_rope
        modeling.apply_rotary_pos_emb = _RotaryPositions(original, fused, everywhere=_is_interpreted(kernel))


class _RotaryPositions:
    """The fused function where Triton runs, the family's own elsewhere (an export that is checked on the CPU)."""

    def __init__(self, original: Callable[..., Any], fused: Callable[..., Any], everywhere: bool) -> None:
        self.original, self.fused, self.everywhere = original, fused, everywhere

    def __call__(self, q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self.fused if q.is_cuda or self.everywhere else self.original)(q, *args, **kwargs)
