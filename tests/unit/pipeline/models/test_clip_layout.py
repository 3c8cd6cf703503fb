"""Layouts of packed clips: windows, word groups and whole samples as spans of rows, checked where they are made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.models.attention import Spans
from pipeline.models.clip_layout import ClipLayout, ClipSizes

LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=5)
SIZES = ClipSizes(window_frames=4, stride=3, max_frames=30)


def lengths_of(spans: Spans) -> list[int]:
    return spans.borders.diff().tolist()


@given(lengths=LENGTHS, size=st.integers(1, 9))
def test_windows_partition_every_sample_at_its_own_borders(lengths: list[int], size: int) -> None:
    layout = ClipLayout.of(lengths, SIZES._replace(window_frames=size))
    for spans, shift in ((layout.windows, 0), (layout.shifted_windows, size // 2)):
        starts, row = [], 0
        for length in lengths:
            for position in range(length):
                if position == 0 or (position - shift) % size == 0:
                    starts.append(row)
                row += 1
        assert spans.borders.tolist() == [*starts, row] and spans.borders.dtype == torch.int32
        assert spans.longest == max(lengths_of(spans)) <= size


@given(lengths=LENGTHS)
def test_equally_long_runs_stand_together(lengths: list[int]) -> None:
    spans = Spans.of(lengths)
    rows_N = torch.arange(sum(lengths))
    order_N = rows_N if spans.order_N is None else spans.order_N
    place_N = rows_N if spans.place_N is None else spans.place_N
    assert torch.equal(order_N[place_N], rows_N)
    expected = [list(rows) for rows in sorted(rows_N.split(lengths), key=len)]
    parts = order_N.split([count * length for count, length in spans.equal])
    found = [list(run) for part, (_, n) in zip(parts, spans.equal, strict=True) for run in part.split(n)]
    assert found == expected
    assert [n for _, n in spans.equal] == sorted(set(lengths))


def test_queries_stand_in_the_order_of_their_keys() -> None:
    layout = ClipLayout.of([9, 2, 9, 5], SIZES)
    assert layout.word_lengths_B.tolist() == lengths_of(layout.samples) == [3, 1, 3, 2]
    assert layout.samples.equal == ((1, 1), (1, 2), (2, 3)) and layout.queries.equal == ((1, 1), (1, 1), (2, 1))
    assert layout.queries.order_N is not None and layout.queries.order_N.tolist() == [1, 3, 0, 2]


def test_runs_that_stand_in_order_are_not_moved() -> None:
    assert Spans.of([4, 4, 4]).order_N is None and Spans.of([1, 3]).place_N is None


def test_words_by_hand() -> None:
    layout = ClipLayout.of([7, 3], SIZES)
    assert layout.frame_lengths_B.tolist() == [7, 3] and layout.word_lengths_B.tolist() == [3, 1]
    assert layout.frame_samples_N.tolist() == [0] * 7 + [1] * 3
    assert layout.frame_positions_N.tolist() == [*range(7), *range(3)]
    assert layout.word_samples_M.tolist() == [0, 0, 0, 1] and layout.word_positions_M.tolist() == [0, 1, 2, 0]
    assert layout.merge_slots_N.tolist() == [0, 1, 2, 3, 4, 5, 6, 9, 10, 11]
    assert layout.merge_counts_M.tolist() == [3, 3, 1, 3] and layout.longest_frames == 7


def test_padding_puts_zeros_behind_every_sample() -> None:
    layout = ClipLayout.of([4, 7], SIZES)
    words_BSD, mask_BS = layout.pad_words(torch.arange(1.0, 6.0)[:, None])
    assert words_BSD[..., 0].tolist() == [[1, 2, 0], [3, 4, 5]] and mask_BS.tolist() == [
        [True, True, False],
        [True] * 3,
    ]
    frames_BTD = layout.pad_frames(torch.ones(11, 2))
    assert frames_BTD.sum((1, 2)).tolist() == [8, 14] and frames_BTD.shape == (2, 7, 2)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([], "hold an empty clip, or no clip"),
        ([3, 0], r"\[3, 0\] hold an empty clip"),
        ([3, 31], "a clip of 31 frames exceeds max_frames 30"),
    ],
)
def test_lengths_are_checked_where_they_are_made(lengths: list[int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        ClipLayout.of(lengths, SIZES)
