"""The precision in which losses are summed."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """fp32 unless the caller works in fp64: sums over a vocabulary or a batch are not for bf16."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
