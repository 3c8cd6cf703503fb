from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pipeline.errors import DivergedError
from pipeline.evaluate.retrieval import Retrieval, retrieval, retrieval_from_scores, retrieval_metrics
from shards.errors import DataError


def from_matrix(scores: list[list[float]], ids: list[int], row_chunk: int = 2) -> Retrieval:
    matrix = np.array(scores)
    return retrieval_from_scores(lambda rows: matrix[rows], lambda rows: matrix.T[rows], np.array(ids), row_chunk)


def test_ranks_by_hand() -> None:
    # video 0 finds its text first, video 1 second, video 2 third
    result = from_matrix([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.5, 0.6, 0.4]], [0, 1, 2])
    assert result.video_to_text.recall_at_1 == pytest.approx(100 / 3)
    assert result.video_to_text.median_rank == 2.0
    assert (result.video_to_text.recall_at_5, result.video_to_text.chance_at_5) == (100.0, 100.0)
    # columns: text 0 -> video 0 first; text 1 -> video 1 first; text 2 -> video 2 first
    assert (result.text_to_video.recall_at_1, result.text_to_video.median_rank) == (100.0, 1.0)
    assert result.samples == 3
    assert result.to_dict()["samples"] == 3


def test_ties_count_against_the_model() -> None:
    result = from_matrix([[0.5] * 4] * 4, [0, 1, 2, 3])
    assert (result.video_to_text.recall_at_1, result.video_to_text.median_rank) == (0.0, 4.0)
    constant = retrieval(np.ones((4, 3)), np.ones((4, 3)), np.arange(4))
    assert constant.text_to_video.recall_at_1 == 0.0


def test_equal_texts_are_right_answers() -> None:
    # video 0 prefers text 2, which is the same sentence
    scores = [[0.1, 0.2, 0.9], [0.0, 1.0, 0.0], [0.3, 0.1, 0.2]]
    assert from_matrix(scores, [7, 8, 7]).video_to_text.recall_at_1 == 100.0
    assert from_matrix(scores, [7, 8, 9]).video_to_text.recall_at_1 == pytest.approx(100 / 3)


def test_chance_is_exact() -> None:
    ids = [0, 1, 1, 2, 3, 4]
    result = from_matrix(np.random.default_rng(0).random((6, 6)).tolist(), ids)
    hits = [
        any(ids[candidate] == ids[query] for candidate in order[:5])
        for query in range(6)
        for order in itertools.permutations(range(6))
    ]
    assert result.video_to_text.chance_at_5 == pytest.approx(100 * sum(hits) / len(hits))
    assert result.video_to_text.chance_at_1 == pytest.approx(100 * (4 * 1 / 6 + 2 * 2 / 6) / 6)
    assert result.video_to_text.chance_at_10 == 100.0


@pytest.mark.parametrize("row_chunk", [1, 3, 100])
def test_chunks_change_nothing_and_scale_does_not_matter(row_chunk: int) -> None:
    rng = np.random.default_rng(0)
    video, noise, ids = rng.normal(size=(40, 8)), rng.normal(size=(40, 8)), rng.integers(0, 30, 40)
    text = (video + noise) * rng.uniform(0.1, 10, (40, 1))
    whole = retrieval(video, text, ids, 40)
    assert retrieval(video.astype(np.float32).astype(np.float64) * 3, text, ids, row_chunk) == whole
    assert whole.video_to_text.recall_at_1 > 3 * whole.video_to_text.chance_at_1


def test_flat_metrics() -> None:
    metrics = retrieval_metrics(torch.eye(4), torch.eye(4), torch.arange(4))
    assert metrics["video_to_text/r1"] == 100.0 and metrics["text_to_video/median_rank"] == 1.0
    assert metrics["text_to_video/chance_r1"] == 25.0 and len(metrics) == 14


def test_nan_is_no_perfect_rank() -> None:
    video = np.ones((3, 2))
    video[1] = np.nan
    with pytest.raises(DivergedError, match=r"similarities of samples 0\.\.2 hold NaN"):
        retrieval(video, np.ones((3, 2)), np.arange(3))


def test_errors() -> None:
    with pytest.raises(DataError, match="2 videos, 3 texts and 3 text ids"):
        retrieval(np.ones((2, 2)), np.ones((3, 2)), np.arange(3))
    with pytest.raises(DataError, match="no samples to retrieve"):
        retrieval(np.ones((0, 2)), np.ones((0, 2)), np.arange(0))
