"""Packed rows cut into spans: documents of a pack, windows of frames, whole samples.

Every span is contiguous, so its borders are all that a fused kernel needs. They are made on the CPU, from lengths that
are known there, and travel to the device with the batch: nothing on the device is ever asked for its size.

Legend: G spans, N packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Spans(NamedTuple):
    """A named tuple, because ZeRO-3's hooks look for tensors inside tuples and dicts only."""

    borders: Tensor
    """int32 [G + 1]: the first row of every span, then N."""
    longest: int
    """Rows of the longest span."""
    order_N: Tensor | None
    """int64: the rows span by span, shorter spans first, for code that computes equally long spans together; None: as
    they stand."""
    place_N: Tensor | None
    """int64: where each row is in `order_N`; None: as they stand."""
    equal: tuple[tuple[int, int], ...]
    """(spans, rows of each), in the order of `order_N`."""

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray, beside: Sequence[int] | np.ndarray | None = None) -> Spans:
        """Spans of these lengths, at least 1 each.

        Args:
            lengths: rows of every span.
            beside: for queries, all spans of one length: the lengths of their spans of keys. Both sides are then in the
                same order.
        """
        length_G = np.asarray(lengths, dtype=np.int64)
        assert beside is None or (length_G == length_G[0]).all()
        by_G = length_G if beside is None else np.asarray(beside, dtype=np.int64)
        borders = np.concatenate((np.zeros(1, np.int64), length_G.cumsum()))
        order_G = np.argsort(by_G, kind="stable")
        _, first, counts = np.unique(by_G[order_G], return_index=True, return_counts=True)
        equal = tuple(zip(counts.tolist(), length_G[order_G][first].tolist(), strict=True))
        order_N: Tensor | None = None
        place_N: Tensor | None = None
        if not (order_G[:-1] < order_G[1:]).all():
            sorted_G = length_G[order_G]
            shift_G = borders[order_G] - (sorted_G.cumsum() - sorted_G)
            order = np.arange(borders[-1]) + np.repeat(shift_G, sorted_G)
            place = np.empty_like(order)
            place[order] = np.arange(len(order))
            order_N, place_N = torch.from_numpy(order), torch.from_numpy(place)
        return cls(torch.from_numpy(borders.astype(np.int32)), int(length_G.max()), order_N, place_N, equal)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Spans:
        """The same with its tensors on a device."""
        moved: list[Any] = [x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x for x in self]
        return Spans(*moved)
