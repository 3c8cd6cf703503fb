"""An attention that takes the memory of a fused kernel and computes nothing: for models on the meta device.

FlashAttention (arXiv 2205.14135, section 3.1) keeps queries, keys, values, output and one fp32 number per row and head
for backward, and never a matrix of scores. Every backend of `pipeline.models.attention` does so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KEY = "slt_without_data"
"""Name under which transformers finds it."""


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHLC: Tensor, k_BHLC: Tensor, v_BHLC: Tensor) -> Tensor:
        out_BLHC = torch.empty_like(
            q_BHLC.transpose(1, 2)[..., : v_BHLC.shape[-1]], memory_format=torch.contiguous_format
        )
        normaliser_BHL = q_BHLC.new_empty(q_BHLC.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q_BHLC, k_BHLC, v_BHLC, out_BLHC, normaliser_BHL)
        return out_BLHC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q_BHLC, k_BHLC, v_BHLC, _, _ = ctx.saved_tensors
        return torch.empty_like(q_BHLC), torch.empty_like(k_BHLC), torch.empty_like(v_BHLC)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' signature: [B, H, L, C] in, [B, L, H, C] out."""
    del module, args, kwargs
    return _Fused.apply(query, key, value), None


__all__ = ["KEY", "attend"]
