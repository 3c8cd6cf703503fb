"""Layouts of packed rows: windows, whole samples, and what attention may see."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.word_level import StridedMerge, TemporalBlock, positions, rotary, whole_samples, windows

LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=5)


@given(lengths=LENGTHS, size=st.integers(1, 9), half=st.booleans())
def test_windows_partition_every_sample_at_its_own_borders(lengths: list[int], size: int, half: bool) -> None:
    shift = size // 2 if half else 0
    layout = windows(lengths, size, shift, "cpu")
    group_N = (layout.slot_N // size).tolist()
    expected, group, row = [], -1, 0
    for length in lengths:
        for position in range(length):
            if position == 0 or (position - shift) % size == 0:
                group += 1
            expected.append(group)
            row += 1
    assert group_N == expected
    assert layout.valid_GK.sum() == row and layout.valid_GK.any(1).all()
    assert len(set(layout.slot_N.tolist())) == row


@given(lengths=LENGTHS, size=st.integers(1, 9))
def test_spread_and_gather_are_inverse(lengths: list[int], size: int) -> None:
    rows_ND = torch.arange(sum(lengths) * 2.0).view(-1, 2) + 1
    for layout in (windows(lengths, size, size // 2, "cpu"), whole_samples(lengths, "cpu")):
        spread = layout.spread(rows_ND)
        assert torch.equal(layout.gather(spread), rows_ND)
        assert torch.equal(spread.abs().sum(-1) > 0, layout.valid_GK)


def test_whole_samples_is_the_padded_batch() -> None:
    layout = whole_samples([2, 3], "cpu")
    assert layout.valid_GK.tolist() == [[True, True, False], [True, True, True]]
    assert positions([2, 3], "cpu").tolist() == [0, 1, 0, 1, 2]


def test_a_block_sees_its_own_window_only() -> None:
    block = TemporalBlock(16, 2, 0.0).double()
    rows_ND = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    layout = windows([8], 4, 0, "cpu")
    output = block(rows_ND, layout, rotary(positions([8], "cpu"), 8))
    (grad,) = torch.autograd.grad(output[1].sum(), rows_ND)
    assert grad[:4].abs().sum(1).gt(0).all() and grad[4:].abs().sum() == 0


def test_shifted_windows_join_neighbours() -> None:
    assert (windows([8], 4, 2, "cpu").slot_N // 4).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_the_merge_of_a_short_tail_is_its_masked_mean_plus_the_zero_filled_projection() -> None:
    merge = StridedMerge(4, 3).double()
    rows_ND = torch.randn(5, 4, dtype=torch.float64)
    words_MD = merge(rows_ND, windows([5], 3, 0, "cpu"))
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
