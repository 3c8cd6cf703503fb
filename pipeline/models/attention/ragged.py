"""Attention of packed queries to packed keys, span by span: the one place that calls an attention kernel.

Legend: N packed queries, M packed keys, H heads, C channels per head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.attention.choosing import kernel
from pipeline.models.attention.spans import Spans


@dataclass(frozen=True)
class Reach:
    """Which keys a query sees: those of its own span; with ``causal`` and ``window`` a part of them."""

    queries: Spans
    keys: Spans
    """The same object for self-attention. Otherwise both sides have the same number of spans."""
    scale: float | None = None
    """None: 1 / sqrt(channels)."""
    causal: bool = False
    window: int | None = None
    """Keys less than this many rows away."""

    def __post_init__(self) -> None:
        if self.queries is not self.keys and (self.causal or self.window is not None):
            raise ValueError("causal and windowed attention need queries and keys with the same borders")

    @property
    def left_right(self) -> tuple[int, int]:
        """The same as FlashAttention's window_size; -1 is unbounded."""
        if self.window is not None and self.window < self.keys.longest:
            return self.window - 1, 0 if self.causal else self.window - 1
        return -1, 0 if self.causal else -1


def ragged_attention(q_NHC: Tensor, k_MHC: Tensor, v_MHC: Tensor, reach: Reach, backend: str) -> Tensor:
    """Softmax attention inside spans -> [N, H, C].

    Args:
        q_NHC: packed queries.
        k_MHC: packed keys; the number of heads divides that of the queries.
        v_MHC: packed values, like the keys.
        reach: which keys a query sees.
        backend: what `choose` returned for this device, precision and number of channels.
    """
    return _RUNNERS[backend](q_NHC, k_MHC, v_MHC, reach)


def _sdpa(q_NHC: Tensor, k_MHC: Tensor, v_MHC: Tensor, reach: Reach) -> Tensor:
    """Equally long spans together, without padding or mask: [G, n, H, C] views of the sorted rows."""
    queries, keys = reach.queries, reach.keys
    sizes = list(zip(queries.equal, keys.equal, strict=True))
    q_parts = _sorted(q_NHC, queries).split([spans * n for (spans, n), _ in sizes])
    k_parts, v_parts = (_sorted(x, keys).split([spans * m for _, (spans, m) in sizes]) for x in (k_MHC, v_MHC))
    grouped = q_NHC.shape[1] != k_MHC.shape[1]
    mixed = []
    for q, k, v, ((spans, _), _) in zip(q_parts, k_parts, v_parts, sizes, strict=True):
        q, k, v = (rows.unflatten(0, (spans, -1)).transpose(1, 2) for rows in (q, k, v))
        mask = _window_mask(q.shape[2], reach, q.device)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=reach.causal and mask is None, scale=reach.scale, enable_gqa=grouped
        )
        mixed.append(out.transpose(1, 2).flatten(0, 1))
    rows_NHC = torch.cat(mixed)
    return rows_NHC if queries.place_N is None else rows_NHC.index_select(0, queries.place_N)


def _sorted(rows_NHC: Tensor, spans: Spans) -> Tensor:
    return rows_NHC if spans.order_N is None else rows_NHC.index_select(0, spans.order_N)


def _window_mask(length: int, reach: Reach, device: torch.device) -> Tensor | None:
    if reach.window is None or reach.window >= length:
        return None
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return (back < reach.window) & (back >= 0 if reach.causal else back > -reach.window)


def _torch_varlen(q_NHC: Tensor, k_MHC: Tensor, v_MHC: Tensor, reach: Reach) -> Tensor:
    attend, queries, keys = kernel("torch_varlen"), reach.queries, reach.keys
    # torch 2.12 needs an argument for grouped heads, 2.11 does not have it
    grouped = {"enable_gqa": q_NHC.shape[1] != k_MHC.shape[1]} if _takes(attend, "enable_gqa") else {}
    return attend(
        q_NHC, k_MHC, v_MHC, queries.borders, keys.borders, queries.longest, keys.longest,
        scale=reach.scale, window_size=reach.left_right, **grouped,
    )  # fmt: skip


def _flash(backend: str) -> Callable[[Tensor, Tensor, Tensor, Reach], Tensor]:
    def run(q_NHC: Tensor, k_MHC: Tensor, v_MHC: Tensor, reach: Reach) -> Tensor:
        unbounded = None if backend == "fa4" else -1
        left, right = (unbounded if side == -1 else side for side in reach.left_right)
        result = kernel(backend)(
            q_NHC,
            k_MHC,
            v_MHC,
            cu_seqlens_q=reach.queries.borders,
            cu_seqlens_k=reach.keys.borders,
            max_seqlen_q=reach.queries.longest,
            max_seqlen_k=reach.keys.longest,
            softmax_scale=reach.scale,
            causal=reach.causal,
            window_size=(left, right),
        )
        return result[0] if isinstance(result, tuple) else result  # fa4 and old fa3 return (out, lse)

    return run


@cache
def _takes(function: Callable[..., Any], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


_RUNNERS: dict[str, Callable[[Tensor, Tensor, Tensor, Reach], Tensor]] = {
    "sdpa": _sdpa,
    "torch_varlen": _torch_varlen,
    **{backend: _flash(backend) for backend in ("fa2", "fa3", "fa4")},
}
