"""Word level: what attention may see, and how frames become word tokens."""

from __future__ import annotations

import torch

from pipeline.models.clip_layout import ClipLayout, ClipSizes
from pipeline.models.word_level import StridedMerge, TemporalBlock, rotary

SIZES = ClipSizes(window_frames=4, stride=3, max_frames=30)


def test_a_block_sees_its_own_window_only() -> None:
    block = TemporalBlock(16, 2, 0.0).double()
    rows_ND = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    layout = ClipLayout.of([8], SIZES)
    rope = rotary(layout.frame_positions_N, 8)
    (grad,) = torch.autograd.grad(block(rows_ND, layout.windows, rope)[1].sum(), rows_ND)
    assert grad[:4].abs().sum(1).gt(0).all() and grad[4:].abs().sum() == 0
    (grad,) = torch.autograd.grad(block(rows_ND, layout.shifted_windows, rope)[4].sum(), rows_ND)
    assert grad[2:6].abs().sum(1).gt(0).all() and grad[[0, 1, 6, 7]].abs().sum() == 0, "windows moved by half join"


def test_the_merge_of_a_short_tail_is_its_mean_plus_the_zero_filled_projection() -> None:
    merge = StridedMerge(4, 3).double()
    rows_ND = torch.randn(5, 4, dtype=torch.float64)
    words_MD = merge(rows_ND, ClipLayout.of([5], SIZES))
    normed = merge.norm(rows_ND)
    tail = torch.cat((normed[3], normed[4], torch.zeros(4, dtype=torch.float64)))
    torch.testing.assert_close(words_MD[1], rows_ND[3:].mean(0) + merge.project(tail))
    torch.testing.assert_close(words_MD[0], rows_ND[:3].mean(0) + merge.project(normed[:3].flatten()))


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    from pipeline.models.word_level import _rotate

    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        return (_rotate(q, rotary(torch.tensor([at_q]), 8)) * _rotate(k, rotary(torch.tensor([at_k]), 8))).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-4, rtol=0)
    assert not torch.allclose(score(3, 1), score(1, 3))
