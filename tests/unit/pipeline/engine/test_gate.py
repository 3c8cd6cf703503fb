"""The decision on a step, and the question that DeepSpeed asks for it."""

from __future__ import annotations

import inspect
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2

from pipeline.engine.gate import Gate, finite_or_nothing, gate_steps


@pytest.mark.parametrize(
    ("norm", "limit", "refused", "shown"),
    [
        (1.5, math.inf, False, 1.5), (0.0, math.inf, False, 0.0), (1.5, 1.5, False, 1.5), (1.6, 1.5, True, 1.6),
        (math.inf, math.inf, True, math.inf), (math.nan, math.inf, True, math.inf), (-1.0, math.inf, True, math.inf),
    ],
)  # fmt: skip
def test_a_norm_that_is_not_finite_or_too_large_is_refused(
    norm: float, limit: float, refused: bool, shown: float
) -> None:
    gate = Gate()
    gate.limit = limit
    assert gate.refuses(torch.tensor([norm], dtype=torch.float64)) is refused and gate.grad_norm == shown
    assert gate.refuses(norm) is refused


@pytest.mark.parametrize("value", [1.7, -0.3, 0.0, 1e15])
def test_a_finite_loss_is_untouched_to_the_bit(value: float) -> None:
    weight = torch.tensor([value, 2.0], requires_grad=True)
    plain, guarded = ((weight * weight).sum(), finite_or_nothing((weight * weight).sum()))
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (plain, guarded)]
    assert torch.equal(plain, guarded) and torch.equal(*gradients)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float) -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    finite_or_nothing((3 * weight).sum() + value).backward()
    assert weight.grad is not None and weight.grad.isnan().all()


def test_the_question_is_answered_only_while_its_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("a_zero_optimizer")
    module.is_invalid_grad_norm = original = lambda norm: False
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Optimizer:
        overflow, norms = False, iter([3.0, math.nan, None])

        def step(self) -> None:
            norm = next(self.norms)
            self.overflow = norm is None or module.is_invalid_grad_norm(norm)

    Optimizer.__module__ = module.__name__
    engine = SimpleNamespace(optimizer=Optimizer())
    gate = gate_steps(engine)
    seen = []
    for _ in range(3):
        engine.optimizer.step()
        seen.append((gate.applied, gate.grad_norm))
        assert module.is_invalid_grad_norm is original
    assert seen == [(True, 3.0), (False, math.inf), (False, math.inf)], "the last was skipped before it had a norm"


@pytest.mark.parametrize("module", [stage3, stage_1_and_2, bf16_optimizer, unfused_optimizer], ids=lambda m: m.__name__)
def test_where_deepspeed_asks(module: ModuleType) -> None:
    """If this fails, DeepSpeed has changed, and steps may be taken without being asked for."""
    assert "is_invalid_grad_norm(" in inspect.getsource(module)
