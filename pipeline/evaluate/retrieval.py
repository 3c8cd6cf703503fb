"""Video-text retrieval: recall at k and median rank in both directions, with ties counted against the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import DivergedError
from shards.errors import DataError

CUTOFFS = (1, 5, 10)


@dataclass(frozen=True, slots=True)
class Direction:
    """Scores of one direction; recalls in percent."""

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    median_rank: float
    """1 is best."""
    chance_at_1: float
    chance_at_5: float
    chance_at_10: float
    """Expected recall of a random order, given how many answers of each query are right."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    video_to_text: Direction
    text_to_video: Direction
    samples: int

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def retrieval_metrics(video_NE: Any, text_NE: Any, text_ids_N: Any) -> dict[str, float]:
    """`retrieval` of CPU tensors or arrays as `flat_metrics`."""
    return flat_metrics(retrieval(np.asarray(video_NE), np.asarray(text_NE), np.asarray(text_ids_N)))


def flat_metrics(result: Retrieval) -> dict[str, float]:
    """One number per name: ``video_to_text/r1``, ``/chance_r1``, ``/median_rank``, and the other direction's."""
    metrics: dict[str, float] = {}
    for name, direction in (("video_to_text", result.video_to_text), ("text_to_video", result.text_to_video)):
        for k in CUTOFFS:
            metrics[f"{name}/r{k}"] = getattr(direction, f"recall_at_{k}")
            metrics[f"{name}/chance_r{k}"] = getattr(direction, f"chance_at_{k}")
        metrics[f"{name}/median_rank"] = direction.median_rank
    return metrics


ScoreRows = Callable[[slice], np.ndarray]
"""Scores [rows, N] of some queries against all candidates; larger is better."""


def retrieval(video_NE: np.ndarray, text_NE: np.ndarray, text_ids_N: np.ndarray, row_chunk: int = 1024) -> Retrieval:
    """Retrieval by cosine similarity of sentence embeddings.

    Args:
        video_NE, text_NE: rows with the same number belong together.
        text_ids_N: identity of each text. Every candidate with the query's text is correct.
        row_chunk: queries whose similarities are in memory at once.

    Raises:
        DataError: no samples or lengths that differ.
        DivergedError: embeddings that are not finite (comparisons with NaN would look like a perfect rank).
    """
    if not len(video_NE) == len(text_NE) == len(text_ids_N):
        raise DataError(
            f"{len(video_NE)} videos, {len(text_NE)} texts and {len(text_ids_N)} text ids",
            where="retrieval",
            fix="pass one row of each per sample",
        )
    return retrieval_from_scores(*cosine_scores(video_NE, text_NE), text_ids_N, row_chunk)


def cosine_scores(video_NE: np.ndarray, text_NE: np.ndarray) -> tuple[ScoreRows, ScoreRows]:
    """Video-to-text and text-to-video scores by the cosine of embeddings."""
    video_NE, text_NE = _unit_rows(video_NE), _unit_rows(text_NE)
    return lambda rows: video_NE[rows] @ text_NE.T, lambda rows: text_NE[rows] @ video_NE.T


def retrieval_from_scores(
    video_to_text: ScoreRows, text_to_video: ScoreRows, text_ids_N: np.ndarray, row_chunk: int = 1024
) -> Retrieval:
    """Retrieval from any scores, computed ``row_chunk`` queries at a time. Raises as `retrieval`."""
    if not len(text_ids_N):
        raise DataError("no samples to retrieve", where="retrieval", fix="check the split and corpus filters")
    return Retrieval(
        _direction(_ranks(video_to_text, text_ids_N, row_chunk), text_ids_N),
        _direction(_ranks(text_to_video, text_ids_N, row_chunk), text_ids_N),
        len(text_ids_N),
    )


def _unit_rows(values_NE: np.ndarray) -> np.ndarray:
    values_NE = np.asarray(values_NE, dtype=np.float64)
    norms_N = np.linalg.norm(values_NE, axis=1, keepdims=True)
    return values_NE / np.where(norms_N > 0, norms_N, 1.0)


def _ranks(scores_of: ScoreRows, text_ids_N: np.ndarray, row_chunk: int) -> np.ndarray:
    """Rank of each query's best right answer among the wrong ones; ties count as ahead of it."""
    ranks = []
    for start in range(0, len(text_ids_N), row_chunk):
        rows = slice(start, min(start + row_chunk, len(text_ids_N)))
        scores_BN = np.asarray(scores_of(rows))
        if not np.isfinite(scores_BN).all():
            raise DivergedError(f"similarities of samples {rows.start}..{rows.stop - 1} hold NaN or infinity")
        right_BN = text_ids_N[rows, None] == text_ids_N[None, :]
        best_B = np.where(right_BN, scores_BN, -np.inf).max(axis=1, keepdims=True)
        ranks.append(1 + (~right_BN & (scores_BN >= best_B)).sum(axis=1))
    return np.concatenate(ranks)


def _direction(ranks_N: np.ndarray, text_ids_N: np.ndarray) -> Direction:
    _, group_N, counts = np.unique(text_ids_N, return_inverse=True, return_counts=True)
    recalls = [100.0 * float((ranks_N <= k).mean()) for k in CUTOFFS]
    chances = [100.0 * float(np.mean([_chance(len(ranks_N), int(c), k) for c in counts[group_N]])) for k in CUTOFFS]
    return Direction(
        recall_at_1=recalls[0],
        recall_at_5=recalls[1],
        recall_at_10=recalls[2],
        median_rank=float(np.median(ranks_N)),
        chance_at_1=chances[0],
        chance_at_5=chances[1],
        chance_at_10=chances[2],
    )


def _chance(candidates: int, right: int, k: int) -> float:
    """Probability that a random order puts one of ``right`` answers among the first ``k`` of ``candidates``."""
    if k >= candidates:
        return 1.0
    return 1.0 - math.comb(candidates - right, k) / math.comb(candidates, k)
