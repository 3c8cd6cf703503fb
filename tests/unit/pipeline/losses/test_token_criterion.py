"""A scalar of token log probabilities against plain autograd over all logits at once, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.losses import Criterion, ScaledHead, TokenLoss, token_criterion
from tests.unit.pipeline.losses.test_token import VOCABULARY, WIDTH, linear, rand

ROWS = 9


def curved(log_probs_N: Tensor) -> Tensor:
    """Couples all rows."""
    return (log_probs_N.sum() / 7).exp() + log_probs_N.square().sum()


def reference(hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, criterion: Criterion) -> Tensor:
    return criterion(torch.log_softmax(head(hidden_ND), -1).gather(1, targets_N[:, None])[:, 0])


@pytest.mark.parametrize("chunk", [1, 4, 20])
@pytest.mark.parametrize(("factor", "softcap"), [(1.0, None), (0.25, 0.7)])
def test_value_and_gradients(chunk: int, factor: float, softcap: float | None) -> None:
    plain = linear(bias=True)
    head = ScaledHead(plain, factor, softcap)
    hidden_ND, targets_N = rand(ROWS, WIDTH).requires_grad_(), torch.arange(ROWS) % VOCABULARY
    leaves = [hidden_ND, *plain.parameters()]
    expected = reference(hidden_ND, head, targets_N, curved)
    loss = TokenLoss(chunk)(hidden_ND, targets_N, head=head, criterion=curved)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(3 * expected, leaves)
    for grad, correct in zip(torch.autograd.grad(3 * loss, leaves), wanted, strict=True):
        torch.testing.assert_close(grad, correct, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(token_criterion(hidden_ND, head, targets_N, curved, (chunk, "torch")), loss)


def test_a_frozen_head_gets_no_gradient() -> None:
    head, hidden_ND = linear().requires_grad_(False), rand(ROWS, WIDTH).requires_grad_()
    token_criterion(hidden_ND, head, torch.arange(ROWS), curved, (4, "torch")).backward()
    assert hidden_ND.grad is not None and head.weight.grad is None
