"""Ragged attention equals one span at a time in float64, and what every library is asked for means the same.

There is no GPU here: a stand-in for each library computes what its documentation says of the arguments it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.models.attention import BACKENDS, Reach, Spans, ragged, ragged_attention

LENGTHS = (5, 1, 9, 2, 5, 12)
HEADS, CHANNELS = 4, 8


def pooling(lengths: tuple[int, ...], queries: int) -> tuple[Spans, Spans]:
    return Spans.of([queries] * len(lengths), beside=lengths), Spans.of(lengths)


def documents() -> tuple[Spans, Spans]:
    spans = Spans.of(LENGTHS)
    return spans, spans


CASES: dict[str, tuple[tuple[Spans, Spans], bool, int | None]] = {
    "bidirectional": (documents(), False, None),
    "causal": (documents(), True, None),
    "causal window": (documents(), True, 3),
    "window": (documents(), False, 3),
    "pooling": (pooling(LENGTHS, 1), False, None),
    "cross": (pooling(LENGTHS, 3), False, None),
}


def one_by_one(
    q_NHC: Tensor, k_MHC: Tensor, v_MHC: Tensor, see: Callable[[int, int], Tensor], *borders: Tensor
) -> Tensor:
    """Softmax attention of every span, written out. ``see(n, m)``: which of m keys each of n queries sees."""
    mixed, groups = [], q_NHC.shape[1] // k_MHC.shape[1]
    sizes = [run.diff().tolist() for run in borders]
    for q, k, v in zip(q_NHC.split(sizes[0]), k_MHC.split(sizes[1]), v_MHC.split(sizes[1]), strict=True):
        k, v = (rows.repeat_interleave(groups, dim=1) for rows in (k, v))
        scores_HNM = torch.einsum("nhc,mhc->hnm", q, k)
        weights_HNM = scores_HNM.masked_fill(~see(len(q), len(k)), -torch.inf).softmax(-1)
        mixed.append(torch.einsum("hnm,mhc->nhc", weights_HNM, v))
    return torch.cat(mixed)


def inputs(queries: Spans, keys: Spans, key_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(int(queries.borders[-1]), HEADS), (int(keys.borders[-1]), key_heads), (int(keys.borders[-1]), key_heads)]
    return [
        torch.randn(*shape, CHANNELS, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    ]


def expected(parts: list[Tensor], reach: Reach) -> Tensor:
    def see(n: int, m: int) -> Tensor:
        back = torch.arange(n)[:, None] - torch.arange(m)[None, :]
        seen = back >= 0 if reach.causal else torch.ones(n, m, dtype=torch.bool)
        return seen & (back.abs() < reach.window) if reach.window is not None else seen

    q_NHC, k_MHC, v_MHC = parts
    scale = CHANNELS**-0.5 if reach.scale is None else reach.scale
    return one_by_one(q_NHC * scale, k_MHC, v_MHC, see, reach.queries.borders, reach.keys.borders)


def flash_semantics(q: Tensor, k: Tensor, v: Tensor, borders: list[Tensor], left_right: tuple[Any, Any]) -> Tensor:
    """FlashAttention's: query n of N sees keys n + M - N - left to n + M - N + right; None or negative is no limit."""
    left, right = (torch.inf if side is None or side < 0 else side for side in left_right)

    def see(n: int, m: int) -> Tensor:
        ahead = torch.arange(m)[None, :] - torch.arange(n)[:, None] - (m - n)
        return (ahead <= right) & (-ahead <= left)

    return one_by_one(q, k, v, see, *borders)


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
    """The names that flash-attn 2.8, 3 and 4 share; causal takes the right side away."""
    borders = [options.pop("cu_seqlens_q"), options.pop("cu_seqlens_k")]
    longest = [options.pop("max_seqlen_q"), options.pop("max_seqlen_k")]
    assert longest == [int(border.diff().max()) for border in borders] and borders[0].dtype == torch.int32
    scale, causal, (left, right) = options.pop("softmax_scale"), options.pop("causal"), options.pop("window_size")
    assert not options
    scaled = q * (CHANNELS**-0.5 if scale is None else scale)
    return flash_semantics(scaled, k, v, borders, (left, 0 if causal else right)), None


def varlen_attn_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    scaled = query * (CHANNELS**-0.5 if scale is None else scale)
    return flash_semantics(scaled, key, value, [cu_seq_q, cu_seq_k], window_size)


def varlen_attn_2_13(*args: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1]), "torch 2.12 and later refuse grouped heads otherwise"
    return varlen_attn_2_11(*args, **options)


LIBRARIES = [
    *((name, flash_attn_varlen_func) for name in ("fa2", "fa3", "fa4")),
    ("torch_varlen", varlen_attn_2_11),
    ("torch_varlen", varlen_attn_2_13),
    ("sdpa", None),
]


@pytest.mark.parametrize(("backend", "library"), LIBRARIES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_every_backend_computes_one_span_at_a_time(
    backend: str, library: Any, case: str, key_heads: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (queries, keys), causal, window = CASES[case]
    monkeypatch.setattr(ragged, "kernel", lambda name: library)
    parts = inputs(queries, keys, key_heads)
    reach = Reach(queries, keys, scale, causal, window)
    found, right = ragged_attention(*parts, reach, backend), expected(parts, reach)
    torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
    upstream = torch.randn(right.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, other in zip(*(torch.autograd.grad(out, parts, upstream) for out in (found, right)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


def test_every_backend_is_tried() -> None:
    assert {name for name, _ in LIBRARIES} == set(BACKENDS)


def test_no_limit_is_said_as_each_library_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4 takes None for an unlimited side, the others -1 (4 would subtract it)."""
    asked: dict[str, Any] = {}

    def note(backend: str) -> Callable[..., Tensor]:
        def call(q: Tensor, *args: Any, **options: Any) -> Tensor:
            asked[backend] = options["window_size"]
            return q

        return call

    monkeypatch.setattr(ragged, "kernel", note)
    (queries, keys), _, _ = CASES["pooling"]
    for backend in ("fa4", "fa3", "fa2", "torch_varlen"):
        ragged_attention(*inputs(queries, keys, HEADS), Reach(queries, keys), backend)
    assert asked == {"fa4": (None, None), "fa3": (-1, -1), "fa2": (-1, -1), "torch_varlen": (-1, -1)}
