"""Scores of whole videos: by hand-made subtitles with known answers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.evaluate.broadcasts import (
    Subtitled,
    iou,
    matched_texts,
    same_segments,
    score_broadcasts,
    segmentation,
    united,
)
from pipeline.evaluate.protocols import get_protocol
from shards.corpora.captions import Caption
from shards.errors import DataError


def captions(*cues: tuple[float, float, str]) -> list[Caption]:
    return [Caption(start, end, text, line) for line, (start, end, text) in enumerate(cues, 1)]


TRUE = captions((1, 3, "the rain in the north"), (4, 6, "the sun in the south"), (8, 9, "wind and clouds at night"))


def test_the_same_subtitles_score_full_marks() -> None:
    scores = score_broadcasts([Subtitled("news", 10.0, TRUE, TRUE)], get_protocol("default"))
    assert scores.sentences.bleu4 == pytest.approx(100) and scores.videos.bleu4 == pytest.approx(100)
    found = scores.segmentation
    assert (found.segment_f1, found.iou, found.frame_f1, found.segments_per_reference) == (100, 100, 100, 1)
    assert scores.to_dict()["number_of_videos"] == 1


def test_texts_go_to_the_sentence_they_overlap_longest() -> None:
    said = captions((0.5, 2, "the rain"), (2, 4.5, "in the north"), (6.5, 7, "nothing"), (8, 9, "wind"))
    assert matched_texts(Subtitled("news", 10.0, TRUE, said)) == [
        ("the rain in the north", TRUE[0].text),
        ("nothing", TRUE[1].text),  # overlaps none, and costs where it is nearest
        ("wind", TRUE[2].text),
    ]


def test_whole_videos_do_not_depend_on_the_cuts() -> None:
    merged = captions((1, 9, " ".join(caption.text for caption in TRUE)))
    scores = score_broadcasts([Subtitled("news", 10.0, TRUE, merged)], get_protocol("default"))
    assert scores.videos.bleu4 == pytest.approx(100) and scores.sentences.bleu4 < 60
    assert scores.segmentation.segment_f1 == 0 and scores.segmentation.segments_per_reference == pytest.approx(1 / 3)


def test_a_video_without_subtitles_of_the_model_scores_nothing() -> None:
    scores = score_broadcasts([Subtitled("news", 10.0, TRUE, [])], get_protocol("default"))
    assert (
        scores.sentences.bleu4 == scores.videos.bleu4 == scores.segmentation.iou == scores.segmentation.segment_f1 == 0
    )


def test_a_video_without_true_sentences_is_refused() -> None:
    with pytest.raises(DataError, match="news: no true sentence to compare with"):
        score_broadcasts([Subtitled("news", 10.0, captions((1, 2, " ")), TRUE)], get_protocol("default"))


def test_each_segment_is_the_same_as_one_at_most() -> None:
    assert iou((0, 2), (1, 3)) == pytest.approx(1 / 3) and iou((0, 1), (2, 3)) == 0
    assert same_segments([(0, 10)], [(0, 9), (0, 8)]) == 1
    assert same_segments([(0, 10), (1, 10)], [(0, 9.5), (1, 10)]) == 2
    assert same_segments([(0, 10)], [(5, 15)]) == 0
    assert united([(3, 4), (0, 2), (1, 3)]) == [(0, 4)]


def test_measures_equal_those_counted_frame_by_frame() -> None:
    """Against arrays with one entry per hundredth of a second, as in the paper's own program."""
    rng = np.random.default_rng(0)
    rate, seconds = 100, 60
    videos, gold_N, found_N = [], [], []
    for number in range(3):
        sides = []
        for _ in range(2):
            borders = np.sort(rng.choice(seconds * rate, 20, replace=False)) / rate
            sides.append(captions(*[(a, b, "rain") for a, b in borders.reshape(-1, 2)]))
        videos.append(Subtitled(str(number), seconds, *sides))
        for frames, side in zip((gold_N, found_N), sides, strict=True):
            signing = np.zeros(seconds * rate, bool)
            for caption in side:
                signing[round(caption.start_seconds * rate) : round(caption.end_seconds * rate)] = True
            frames.append(signing)
    gold, found = np.concatenate(gold_N), np.concatenate(found_N)

    def f1(truth: np.ndarray, guess: np.ndarray) -> float:
        return float(2 * (truth & guess).sum() / (truth.sum() + guess.sum()))

    scores = segmentation(videos)
    assert scores.iou == pytest.approx(100 * (gold & found).sum() / (gold | found).sum())
    assert scores.frame_f1 == pytest.approx(50 * (f1(gold, found) + f1(~gold, ~found)))
    assert scores.segments_per_reference == 1.0 and dataclasses.asdict(scores)["reference_segments"] == 30
