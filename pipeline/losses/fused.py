"""The token loss of a chunk in one Triton kernel of liger-kernel: it reads the logits twice and writes their gradient
over them, where torch makes eight passes and a second copy in fp32.

Only the kernel is used. liger-kernel's own loss over chunks counts the targets with `item()`, which waits for the
device in every micro-batch, and knows no logit scale.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

LARGEST_BLOCK = 32768
"""Columns that one program handles at once, as liger-kernel chooses them for NVIDIA."""


def fused_cross_entropy(
    logits_CV: Tensor, targets_C: Tensor, ignored: int, softcap: float | None, with_grad: bool
) -> Tensor:
    """The cross-entropy of rows, fp32 [C]; with ``with_grad`` its gradient overwrites ``logits_CV`` (contiguous)."""
    triton: Any = importlib.import_module("triton")
    kernel: Any = importlib.import_module("liger_kernel.ops.cross_entropy").liger_cross_entropy_kernel
    rows, columns = logits_CV.shape
    loss_C = torch.zeros(rows, dtype=torch.float32, device=logits_CV.device)
    kernel[(rows,)](
        X_ptr=logits_CV, X_stride=logits_CV.stride(0), Y_ptr=targets_C, Y_stride=targets_C.stride(0),
        loss_ptr=loss_C, loss_stride=1, n_cols=columns, ignore_index=ignored, reduction="sum", softcap=softcap,
        HAS_SOFTCAPPING=softcap is not None, HAS_GRADIENTS=with_grad,
        BLOCK_SIZE=min(LARGEST_BLOCK, triton.next_power_of_2(columns)), num_warps=32,
        # what a plain sum does not use
        weight_ptr=None, HAS_WEIGHT=False, weight_sum=0.0, sum_non_ignore_weight=1, n_non_ignore=1,
        lse_square_scale=0.0, label_smoothing=0.0, z_loss_ptr=None, RETURN_Z_LOSS=False,
        token_accuracy_ptr=None, token_accuracy_stride=0, RETURN_TOKEN_ACCURACY=False,
        predicted_tokens_ptr=None, predicted_tokens_stride=0, RETURN_PREDICTED_TOKENS=False,
    )  # fmt: skip
    return loss_C
