"""Which attention kernel runs here: chosen once per model, logged, never silently another one.

Backends, best first: ``fa4`` (flash-attn-4, Hopper and later), ``fa3`` (flash_attn_interface), ``fa2`` (flash-attn),
``torch_varlen`` (FlashAttention-2 inside torch, arXiv 2307.08691), ``sdpa`` (equally long runs together; any device and
precision; the reference).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from pipeline.errors import RecipeError

log = logging.getLogger(__name__)

BACKENDS = ("fa4", "fa3", "fa2", "torch_varlen", "sdpa")
HOPPER = (9, 0)
AMPERE = (8, 0)


def choose(name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> str:
    """The backend for packed attention on ``device``, logged with the reason against each better one.

    Args:
        name: a backend, or `auto` for the best that works here.
    Raises:
        RecipeError: a forced backend that does not work here, or an unknown name.
    """
    if name != "auto" and name not in BACKENDS:
        raise RecipeError(f"model.attention: {name!r} is not one of auto, {', '.join(BACKENDS)}.")
    device = torch.device(device)
    if name != "auto":
        if problem := _obstacle(name, device, dtype):
            raise RecipeError(
                f"model.attention: {name} cannot run on this machine: {problem}. Use auto, or install what is missing."
            )
        log.info("packed attention: %s (forced by the recipe)", name)
        return name
    obstacles = {backend: _obstacle(backend, device, dtype) for backend in BACKENDS}
    chosen = next(backend for backend in BACKENDS if obstacles[backend] is None)
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in obstacles.items() if reason)
    log.info("packed attention: %s (auto)%s", chosen, f"; not {reasons}" if reasons else "")
    return chosen


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot be used here, or None."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    needed = AMPERE if backend in ("fa2", "torch_varlen") else HOPPER
    if torch.cuda.get_device_capability(device) < needed:
        return f"needs compute capability {needed[0]}.{needed[1]} or newer"
    try:
        kernel(backend)
    except (ImportError, AttributeError) as error:
        return str(error)
    return None


@cache
def kernel(backend: str) -> Callable[..., Any]:
    """The varlen function of a library. flash-attn-4 alone makes `flash_attn` an empty namespace package, so each
    is found by the module that really contains it."""
    module, function = {
        "fa4": ("flash_attn.cute", "flash_attn_varlen_func"),
        "fa3": ("flash_attn_interface", "flash_attn_varlen_func"),
        "fa2": ("flash_attn", "flash_attn_varlen_func"),
        "torch_varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    }[backend]
    return getattr(importlib.import_module(module), function)
