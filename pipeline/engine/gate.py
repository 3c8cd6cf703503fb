"""Whether an optimizer step is applied: decided from the global gradient norm, on every rank alike, before any weight
or moment changes.

DeepSpeed 0.19.8 asks the norm the same question in every ZeRO optimizer, and there is its only wait for the device.
Here the host reads the norm in that place, so that it also knows the number. What DeepSpeed leaves open: without ZeRO
in fp32 it applies any gradients, and no ZeRO stage looks at the loss.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

_QUESTION = "is_invalid_grad_norm"
"""Under this name DeepSpeed's optimizers ask whether to skip the step."""


class Gate:
    """What is known of the last optimizer step."""

    def __init__(self) -> None:
        self.limit = math.inf
        """A step with a larger gradient norm is not applied."""
        self.grad_norm = math.nan
        """Global, before clipping; infinite if not finite, NaN before the first step."""
        self.applied = True

    def refuses(self, norm: torch.Tensor | float) -> bool:
        """Whether a step with this norm is not applied. Waits for the device.

        Args:
            norm: a scalar; ZeRO has replaced one that is not finite by -1.
        """
        value = float(norm)
        self.grad_norm = value if 0 <= value < math.inf else math.inf
        return not self.grad_norm <= self.limit or self.grad_norm == math.inf


def finite_or_nothing(loss: torch.Tensor) -> torch.Tensor:
    """The same loss and gradients to the bit; of a loss that is not finite every gradient is NaN, so that the norm
    tells all ranks."""
    return loss * (loss.detach() * 0 + 1)


def gate_steps(engine: Any) -> Gate:
    """Let a gate decide on the steps of a DeepSpeed engine."""
    gate, optimizer = Gate(), engine.optimizer
    logging.getLogger("DeepSpeed").addFilter(_says_something_new)
    module = sys.modules[type(optimizer).__module__]
    if not hasattr(module, _QUESTION):
        _without_zero(engine, gate)
        return gate
    update = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        gate.grad_norm = math.inf  # of a step that is skipped before there is a norm
        with _answered_by(gate, module):
            result = update(*args, **kwargs)
        gate.applied = not optimizer.overflow
        return result

    optimizer.step = step
    return gate


def _says_something_new(record: logging.LogRecord) -> bool:
    """Not of a skipped step: the log names it in our words, and not all of them are "non-finite"."""
    return "OVERFLOW! Skipping step" not in record.getMessage()


@contextlib.contextmanager
def _answered_by(gate: Gate, module: ModuleType) -> Iterator[None]:
    """One process may hold several engines: the question is this gate's only while its optimizer steps."""
    before = getattr(module, _QUESTION)
    setattr(module, _QUESTION, gate.refuses)
    try:
        yield
    finally:
        setattr(module, _QUESTION, before)


def _without_zero(engine: Any, gate: Gate) -> None:
    """ZeRO stage 0 in fp32 is torch's optimizer alone; DeepSpeed clips before it and forgets the norm."""
    from deepspeed.runtime.utils import clip_grad_norm_

    optimizer = engine.optimizer
    update = optimizer.step

    def clip() -> None:
        norm = clip_grad_norm_(engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu)
        gate.applied = not gate.refuses(norm)

    def step(*args: Any, **kwargs: Any) -> Any:
        return update(*args, **kwargs) if gate.applied else None

    engine.clip_fp32_gradients = clip
    optimizer.step = step
