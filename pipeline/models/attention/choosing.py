"""Which attention kernel runs here: chosen once per model, logged, never silently another one.

Backends, best first: ``fa4`` (flash-attn-4, Hopper and later), ``fa3`` (flash_attn_interface), ``fa2`` (flash-attn),
``torch_varlen`` (FlashAttention-2 inside torch, arXiv 2307.08691), ``sdpa`` (equally long spans together; any device
and precision; the reference).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from pipeline.errors import RecipeError

log = logging.getLogger(__name__)

BACKENDS = ("fa4", "fa3", "fa2", "torch_varlen", "sdpa")


@dataclass(frozen=True)
class _Kernel:
    """A library's function for spans of unequal length, and the devices that it has code for."""

    module: str
    function: str
    capabilities: tuple[int, int]
    """Oldest and newest major compute capability."""


# flash-attn-4 alone makes `flash_attn` an empty namespace package: each is found by the module that really contains it
_KERNELS = {
    "fa4": _Kernel("flash_attn.cute", "flash_attn_varlen_func", (9, 11)),
    "fa3": _Kernel("flash_attn_interface", "flash_attn_varlen_func", (9, 9)),
    "fa2": _Kernel("flash_attn", "flash_attn_varlen_func", (8, 99)),
    "torch_varlen": _Kernel("torch.nn.attention.varlen", "varlen_attn", (8, 99)),
}
CHANNEL_STEP, MOST_CHANNELS = 8, 256
"""Channels per head that the kernels take: multiples of one up to the other."""
BLACKWELL, BLACKWELL_CHANNELS = 10, 128
"""From this major capability on, fa4 takes at most so many channels, or exactly `MOST_CHANNELS`."""


def choose(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int | None = None,
    part: str = "packed documents",
) -> str:
    """The backend for ragged attention on ``device``, logged with the reason against each better one.

    Args:
        name: a backend, or `auto` for the best that works here.
        device: where the model runs.
        dtype: of queries, keys and values.
        head_dim: channels per head; None: not checked.
        part: what attends, for the log and the message.
    Raises:
        RecipeError: a forced backend that does not work here, or an unknown name.
    """
    if name != "auto" and name not in BACKENDS:
        raise RecipeError(f"model.attention: {name!r} is not one of auto, {', '.join(BACKENDS)}.")
    device = torch.device(device)
    if name != "auto":
        if problem := _obstacle(name, device, dtype, head_dim):
            raise RecipeError(
                f"model.attention: {name} cannot run {part} on this machine: {problem}. Use auto, or install what is"
                " missing."
            )
        log.info("attention of %s: %s (forced by the recipe)", part, name)
        return name
    obstacles = {backend: _obstacle(backend, device, dtype, head_dim) for backend in BACKENDS}
    chosen = next(backend for backend in BACKENDS if obstacles[backend] is None)
    backends_of: dict[str, list[str]] = {}
    for backend, reason in obstacles.items():
        if reason is not None:
            backends_of.setdefault(reason, []).append(backend)
    reasons = "".join(f"; not {', '.join(backends)}: {reason}" for reason, backends in backends_of.items())
    log.info("attention of %s: %s (auto)%s", part, chosen, reasons)
    return chosen


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why a backend cannot be used here, or None."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    oldest, newest = _KERNELS[backend].capabilities
    if major < oldest:
        return f"needs compute capability {oldest}.0 or newer, not {major}.{minor}"
    if major > newest:
        return f"has no kernels for compute capability {major}.{minor}, only up to {newest}.x"
    if problem := _channels_obstacle(backend, major, head_dim):
        return problem
    try:
        kernel(backend)
    except (ImportError, AttributeError) as error:
        return str(error)
    return None


def _channels_obstacle(backend: str, major: int, head_dim: int | None) -> str | None:
    if head_dim is None:
        return None
    if head_dim % CHANNEL_STEP or head_dim > MOST_CHANNELS:
        return f"takes multiples of {CHANNEL_STEP} up to {MOST_CHANNELS} channels per head, not {head_dim}"
    if backend == "fa4" and major >= BLACKWELL and BLACKWELL_CHANNELS < head_dim < MOST_CHANNELS:
        return f"takes up to {BLACKWELL_CHANNELS} channels per head here, or {MOST_CHANNELS}, not {head_dim}"
    return None


@cache
def kernel(backend: str) -> Callable[..., Any]:
    """The function of a backend's library. Raises ImportError or AttributeError where it is not installed."""
    found = _KERNELS[backend]
    return getattr(importlib.import_module(found.module), found.function)
