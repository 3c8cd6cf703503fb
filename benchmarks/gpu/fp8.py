"""Linear layers whose three matrix products run in FP8 with one scale per tensor, as a trial: nothing else uses them.

Forward and weight gradient read e4m3, gradients e5m2, accumulated in float32 (arXiv 2209.05433).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Quantised = tuple[torch.Tensor, torch.Tensor]
"""A tensor in FP8 and the float32 scale it must be multiplied with."""


def quantised(tensor: torch.Tensor, dtype: torch.dtype) -> Quantised:
    """The largest magnitude becomes the largest number of ``dtype``; no value is read by the host."""
    scale = tensor.abs().max().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (tensor.float() / scale).to(dtype), scale


def scaled_product(a: Quantised, b_transposed: Quantised) -> torch.Tensor:
    """bf16 [M, N] = a [M, K] @ b_transposed [N, K].T. Sizes are multiples of 16: the kernel's rule."""
    return torch._scaled_mm(
        a[0].contiguous(), b_transposed[0].contiguous().t(), scale_a=a[1], scale_b=b_transposed[1],
        out_dtype=torch.bfloat16,
    )  # fmt: skip


class _Product(torch.autograd.Function):
    """x [N, K], weight [M, K] -> [N, M]."""

    @staticmethod
    def forward(ctx: Any, x_NK: torch.Tensor, weight_MK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_NK, weight_MK)
        return scaled_product(quantised(x_NK, torch.float8_e4m3fn), quantised(weight_MK, torch.float8_e4m3fn))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_NK, weight_MK = ctx.saved_tensors
        (grad_NM,) = grads
        grad, scale = quantised(grad_NM, torch.float8_e5m2)
        x, x_scale = quantised(x_NK, torch.float8_e4m3fn)
        weight, weight_scale = quantised(weight_MK, torch.float8_e4m3fn)
        x_grad_NK = scaled_product((grad, scale), (weight.t(), weight_scale))
        weight_grad_MK = scaled_product((grad.t(), scale), (x.t(), x_scale))
        return x_grad_NK, weight_grad_MK


class Fp8Linear(nn.Linear):
    """A linear layer without bias in bf16; takes over another one's weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, input.shape[-1])
        return _Product.apply(rows, self.weight).reshape(*input.shape[:-1], -1)


def use_fp8(model: nn.Module) -> int:
    """Let every bias-free linear layer of the decoder blocks multiply in FP8; returns how many there are."""
    layers = [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.bias is None and ".layers." in name
    ]
    for layer in layers:
        layer.__class__ = Fp8Linear  # the same object with the same weight, whatever holds it
    return len(layers)
