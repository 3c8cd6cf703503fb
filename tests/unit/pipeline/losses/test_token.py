"""Token cross-entropy against hand-computed values and torch's own over all logits at once, in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.losses import IGNORE_LABEL, ScaledHead, TokenLoss, token_cross_entropy

WIDTH, VOCABULARY = 6, 11


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(bias: bool = False, seed: int = 1) -> nn.Linear:
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).double()
    head.weight.data = rand(VOCABULARY, WIDTH, seed=seed)
    if bias:
        head.bias.data = rand(VOCABULARY, seed=seed + 1)
    return head


def targets_with_gaps(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets_N = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    return targets_N.masked_fill(torch.rand(rows, generator=generator) < 0.3, IGNORE_LABEL)


def reference(hidden_ND: Tensor, head: nn.Module, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_ND), targets_N, ignore_index=IGNORE_LABEL, reduction="sum")


def test_by_hand() -> None:
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = torch.eye(2)
    hidden = torch.tensor([[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    loss = token_cross_entropy(hidden, head, torch.tensor([0, 0, IGNORE_LABEL]))
    # row 0 (logits 2, 0) must give 0; row 1 (logits 0, 1) must give 0; row 2 counts nothing
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1)), rel=1e-6)
    assert loss.dtype == torch.float32 and loss.shape == ()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 13), chunk=st.integers(1, 15), bias=st.booleans(), factor=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 0.7]), seed=st.integers(0, 99),
)  # fmt: skip
def test_values_and_gradients_of_every_head(
    rows: int, chunk: int, bias: bool, factor: float, softcap: float | None, seed: int
) -> None:
    plain = linear(bias, seed)
    head = plain if factor == 1.0 and softcap is None else ScaledHead(plain, factor, softcap)
    hidden_ND = rand(rows, WIDTH, seed=seed).requires_grad_()
    targets_N = targets_with_gaps(rows, seed)
    leaves = [hidden_ND, *plain.parameters()]
    expected = torch.autograd.grad(3 * reference(hidden_ND, head, targets_N), leaves)
    loss = token_cross_entropy(hidden_ND, head, targets_N, chunk)
    torch.testing.assert_close(loss, reference(hidden_ND, head, targets_N), rtol=1e-12, atol=1e-12)
    for grad, wanted in zip(torch.autograd.grad(3 * loss, leaves), expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(token_cross_entropy(hidden_ND, head, targets_N, chunk), loss)


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_score_is_a_connected_zero(rows: int) -> None:
    head, hidden_ND = linear(), rand(rows, WIDTH).requires_grad_()
    loss = TokenLoss(3)(hidden_ND, torch.full((rows,), IGNORE_LABEL), head=head)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden_ND.grad is not None and not hidden_ND.grad.any()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_tied_weights_receive_both_gradients() -> None:
    embedding, head = nn.Embedding(VOCABULARY, WIDTH).double(), linear()
    head.weight = embedding.weight
    ids_N, targets_N = torch.arange(9) % VOCABULARY, targets_with_gaps(9)

    def grad(loss: Any) -> Tensor:
        return torch.autograd.grad(loss(embedding(ids_N).tanh(), head, targets_N), embedding.weight)[0]

    torch.testing.assert_close(grad(token_cross_entropy), grad(reference), rtol=1e-12, atol=1e-12)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the shapes that matrix products give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.shapes.append(tuple(result.shape))
        return result


def products(head: nn.Module, hidden_ND: Tensor) -> list[tuple[int, ...]]:
    with Products() as seen:
        loss = token_cross_entropy(hidden_ND, head, targets_with_gaps(len(hidden_ND)), 4)
        if loss.requires_grad:
            loss.backward()
    return seen.shapes


def test_only_what_trains_gets_a_gradient_and_no_logit_is_computed_twice() -> None:
    head, hidden_ND = linear(), rand(8, WIDTH).requires_grad_()
    logits, states, weight = (4, VOCABULARY), (4, WIDTH), (VOCABULARY, WIDTH)
    assert products(head, hidden_ND) == [logits, states, weight] * 2
    assert products(head.requires_grad_(False), hidden_ND) == [logits, states] * 2
    assert products(head, hidden_ND.detach()) == [logits] * 2
    with torch.no_grad():
        assert products(head.requires_grad_(), hidden_ND) == [logits] * 2


def test_bf16_sums_in_fp32() -> None:
    head, hidden_ND, targets_N = linear(bias=True), rand(600, WIDTH).requires_grad_(), targets_with_gaps(600)
    exact = torch.autograd.grad(reference(hidden_ND, head, targets_N), [hidden_ND, *head.parameters()])
    rough = linear(bias=True).bfloat16()
    rough_ND = hidden_ND.detach().bfloat16().requires_grad_()
    loss = token_cross_entropy(rough_ND, rough, targets_N, 1)
    assert loss.dtype == torch.float32
    # 600 chunks of one row: a sum in bf16 would be off by several percent
    for grad, wanted in zip(torch.autograd.grad(loss, [rough_ND, *rough.parameters()]), exact, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - wanted).norm() < 0.01 * wanted.norm()


def test_a_second_backward_is_refused() -> None:
    loss = token_cross_entropy(rand(3, WIDTH).requires_grad_(), linear(), torch.tensor([1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        loss.backward()


def test_heads_that_are_not_linear() -> None:
    class Adapted(nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states) + 1

    for head in (nn.Sequential(linear()), Adapted(WIDTH, VOCABULARY), ScaledHead(Adapted(WIDTH, VOCABULARY))):
        with pytest.raises(RecipeError, match=r"output head is .*, not a plain linear layer") as error:
            token_cross_entropy(rand(3, WIDTH).float(), head, torch.tensor([1, 2, 3]))
        assert "merge them first" in str(error.value)
