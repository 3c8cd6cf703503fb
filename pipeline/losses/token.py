"""Next-token cross-entropy from hidden states and an output head, with logits of one chunk in memory at a time.

The loss is linear in the step's normalisation, so the gradients of a chunk can be computed right after its logits, in
the forward pass: nothing is kept for the backward pass but the gradients, and no logit is computed twice.

Shape suffixes: N rows, C rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.losses.fused import fused_cross_entropy
from pipeline.losses.precision import wide

Backend = Literal["torch", "liger"]
"""What computes the loss of a chunk from its logits; `liger` in fp32 whatever the input (`pipeline.losses.fused`)."""

IGNORE_LABEL = -100
"""Target of rows that carry no loss (the Hugging Face convention)."""

Criterion = Callable[[Tensor], Tensor]
"""The targets' log probabilities [N] -> a scalar that depends on them."""


class ScaledHead(nn.Module):
    """An output head followed by the logit scale and soft cap of its family (Gemma 2, arXiv 2408.00118)."""

    def __init__(self, head: nn.Module, scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.head, self.scale, self.softcap = head, scale, softcap

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class TokenLoss(nn.Module):
    """`token_cross_entropy` as a part of a model, without parameters of its own.

    A model that may be sharded by ZeRO-3 calls it as a module: DeepSpeed then gathers the head's weight for this part
    alone, once, and releases it after.
    """

    def __init__(self, chunk_tokens: int = 1024, backend: Backend = "torch") -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens
        self.backend: Backend = backend

    # DeepSpeed's hooks look for tensors in positional arguments, so the head comes by name
    def forward(
        self, hidden_ND: Tensor, targets_N: Tensor, *, head: nn.Module, criterion: Criterion | None = None
    ) -> Tensor:
        if criterion is not None:
            return token_criterion(hidden_ND, head, targets_N, criterion, (self.chunk_tokens, self.backend))
        return token_cross_entropy(hidden_ND, head, targets_N, self.chunk_tokens, self.backend)


def token_cross_entropy(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, chunk_tokens: int = 1024, backend: Backend = "torch"
) -> Tensor:
    """Cross-entropy of ``head(hidden_ND)`` summed over rows, with ``chunk_tokens`` rows of logits at once.

    The head's weight is read once, however many rows there are: under ZeRO-3, inside the model's forward, that is one
    gathering per call (`TokenLoss`). No call waits for the device. A backward pass may run once.

    Args:
        hidden_ND: last hidden states of the rows that are scored.
        head: a linear layer with or without bias, tied or not, or a `ScaledHead` around one.
        targets_N: int64 ids to predict; rows with `IGNORE_LABEL` are computed but count nothing.
        chunk_tokens: rows whose logits exist at once.
        backend: what `pipeline.models.kernels.choose` chose.

    Returns:
        The loss sum, scalar: fp32, or fp64 for fp64 input. Without rows it is 0.0 and still connected to the graph:
        every rank can run backward.

    Raises:
        RecipeError: a head that is something else, such as one with adapters.
    """
    linear, scale, softcap = _parts(head)
    weight_VD, bias_V = linear.weight, linear.bias
    after = _AfterHead(scale, softcap, chunk_tokens, backend)
    if torch.is_grad_enabled():
        loss: Tensor = _TokenCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N, after)
        return loss
    return _loss_and_grads(hidden_ND, _Head(weight_VD, bias_V), targets_N, after, _Wanted())[0]


def token_criterion(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, criterion: Criterion, options: tuple[int, Backend]
) -> Tensor:
    """A scalar that ``criterion`` makes of the log probabilities of the targets, none of which is ignored.

    As in `token_cross_entropy`, gradients are computed in the forward pass with one chunk of logits at a time: the
    first pass over the chunks gives the log probabilities, the criterion their gradient, the second pass those of
    ``hidden_ND`` and the head.

    Args:
        criterion: called once, with log probabilities [N] in fp32 (fp64 for fp64 input), whatever their number; its
            gradient with respect to them is asked for where gradients are enabled.
        options: ``chunk_tokens`` and ``backend`` of `token_cross_entropy`; the rest is as there.
    """
    linear, scale, softcap = _parts(head)
    after = _AfterHead(scale, softcap, *options)
    if torch.is_grad_enabled():
        loss: Tensor = _TokenCriterion.apply(hidden_ND, linear.weight, linear.bias, targets_N, after, criterion)
        return loss
    return criterion(_log_probs(hidden_ND, _Head(linear.weight, linear.bias), targets_N, after))


class _Head(NamedTuple):
    weight_VD: Tensor
    bias_V: Tensor | None


class _AfterHead(NamedTuple):
    scale: float
    softcap: float | None
    chunk_tokens: int
    backend: Backend


class _Wanted(NamedTuple):
    """Whose gradient is computed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class _Grads(NamedTuple):
    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def _parts(head: nn.Module) -> tuple[nn.Linear, float, float | None]:
    scale, softcap, linear = 1.0, None, head
    if isinstance(head, ScaledHead):
        scale, softcap, linear = head.scale, head.softcap, head.head
    # a subclass that computes something else (adapters, 8-bit weights) has a forward of its own
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise RecipeError(
            f"the model's output head is {type(linear).__name__}, not a plain linear layer: the loss computes logits"
            " from its weight. Fix: give model.llm a model with a linear head (without adapters or quantisation on it;"
            " merge them first)."
        )
    return linear, scale, softcap


class _TokenCrossEntropy(torch.autograd.Function):
    """Loss and gradients in the forward pass; backward scales them by the gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, after: _AfterHead
    ) -> Tensor:
        wanted = _Wanted(*ctx.needs_input_grad[:3])
        loss, grads = _loss_and_grads(hidden_ND, _Head(weight_VD, bias_V), targets_N, after, wanted)
        ctx.grads = grads
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "the gradients of token_cross_entropy are scaled in place: one backward pass"
        grads, ctx.grads = ctx.grads, None
        return (*(None if grad is None else grad.mul_(grad_loss) for grad in grads), None, None)


class _TokenCriterion(torch.autograd.Function):
    """As `_TokenCrossEntropy`, for the value of a criterion."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor,
        after: _AfterHead, criterion: Criterion,
    ) -> Tensor:  # fmt: skip
        head = _Head(weight_VD, bias_V)
        with torch.enable_grad():
            leaf_N = _log_probs(hidden_ND, head, targets_N, after).requires_grad_()
            loss = criterion(leaf_N)
            (slope_N,) = torch.autograd.grad(loss, leaf_N)
        wanted = _Wanted(*ctx.needs_input_grad[:3])
        ctx.grads = _loss_and_grads(hidden_ND, head, targets_N, after, wanted, -slope_N)[1]
        return loss.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*_TokenCrossEntropy.backward(ctx, grad_loss), None)


@torch.no_grad()
def _log_probs(hidden_ND: Tensor, head: _Head, targets_N: Tensor, after: _AfterHead) -> Tensor:
    """[N] of the targets."""
    chunks = [
        _chunk(F.linear(states_CD, *head), targets_C, after, False)[0]
        for states_CD, targets_C in zip(
            hidden_ND.split(after.chunk_tokens), targets_N.split(after.chunk_tokens), strict=True
        )
    ]
    return -torch.cat(chunks)


def _loss_and_grads(
    hidden_ND: Tensor,
    head: _Head,
    targets_N: Tensor,
    after: _AfterHead,
    wanted: _Wanted,
    weights_N: Tensor | None = None,
) -> tuple[Tensor, _Grads]:
    """The loss sum and its gradients, in the types of what they belong to; sums over rows are made in fp32 or fp64.
    ``weights_N``: of the rows in the gradients."""
    weight_VD, bias_V = head
    exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    loss = hidden_ND.new_zeros((), dtype=exact)
    grad_ND = torch.empty_like(hidden_ND) if wanted.hidden else None
    grad_VD = torch.zeros_like(weight_VD, dtype=exact) if wanted.weight else None
    grad_V = torch.zeros_like(bias_V, dtype=exact) if wanted.bias and bias_V is not None else None
    for start in range(0, len(hidden_ND), after.chunk_tokens):
        rows = slice(start, start + after.chunk_tokens)
        states_CD = hidden_ND[rows]
        losses_C, grad_CV = _chunk(F.linear(states_CD, weight_VD, bias_V), targets_N[rows], after, any(wanted))
        loss += losses_C.sum()
        if grad_CV is None:
            continue
        if weights_N is not None:
            grad_CV.mul_(weights_N[rows, None])
        if grad_V is not None:
            grad_V += grad_CV.sum(0, dtype=exact)
        grad_CV = grad_CV.to(states_CD.dtype)
        if grad_ND is not None:
            torch.mm(grad_CV, weight_VD, out=grad_ND[rows])
        if grad_VD is not None:
            _add_product(grad_VD, grad_CV.T, states_CD)
    return loss, _Grads(
        grad_ND,
        None if grad_VD is None else grad_VD.to(weight_VD.dtype),
        None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype),
    )


def _chunk(logits_CV: Tensor, targets_C: Tensor, after: _AfterHead, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Losses of a chunk's rows and, if asked for, the gradient of their sum with respect to ``logits_CV``, which is
    overwritten."""
    if after.backend == "liger":
        return _fused_chunk(logits_CV, targets_C, after, with_grad)
    logits_CV = wide(logits_CV)
    if after.scale != 1.0:
        logits_CV.mul_(after.scale)
    slope_CV = None
    if after.softcap is not None:
        logits_CV.div_(after.softcap).tanh_()
        slope_CV = 1 - logits_CV.square() if with_grad else None
        logits_CV.mul_(after.softcap)
    log_probs_CV = torch.log_softmax(logits_CV, dim=-1)
    del logits_CV
    counts_C1 = (targets_C != IGNORE_LABEL)[:, None]
    targets_C1 = targets_C[:, None].clamp(min=0)
    losses_C = -log_probs_CV.gather(1, targets_C1).masked_fill_(~counts_C1, 0.0)[:, 0]
    if not with_grad:
        return losses_C, None
    # of the softmax: probabilities minus one at the target
    grad_CV = log_probs_CV.exp_()
    grad_CV.scatter_(1, targets_C1, grad_CV.gather(1, targets_C1) - 1)
    grad_CV.masked_fill_(~counts_C1, 0.0)
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    return losses_C, grad_CV if after.scale == 1.0 else grad_CV.mul_(after.scale)


def _fused_chunk(
    logits_CV: Tensor, targets_C: Tensor, after: _AfterHead, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """`_chunk` by a Triton kernel; the gradient comes in the type of the logits."""
    if after.scale != 1.0:
        logits_CV.mul_(after.scale)
    losses_C = fused_cross_entropy(logits_CV, targets_C, IGNORE_LABEL, after.softcap, with_grad)
    if not with_grad:
        return losses_C, None
    return losses_C, logits_CV if after.scale == 1.0 else logits_CV.mul_(after.scale)


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """Adds a matrix product; products of bf16 matrices are added to a sum in fp32 without rounding where the device's
    library can."""
    if sum_VD.dtype == right_CD.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    elif sum_VD.is_cuda:
        torch.addmm(sum_VD, left_VC, right_CD, out_dtype=sum_VD.dtype, out=sum_VD)
    else:
        sum_VD += left_VC @ right_CD
