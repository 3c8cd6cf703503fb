"""What an export is made of before a byte of it is read: names, shapes and types, and how to read each tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of an export that has not been read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """As it is written; what `read` returns is cast to it."""
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def written_dtype(stored: torch.dtype, floats: torch.dtype) -> torch.dtype:
    """Floats are written in the run's precision; counters and masks as they are."""
    return floats if stored.is_floating_point else stored
