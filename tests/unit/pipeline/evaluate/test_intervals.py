"""Intervals against sacreBLEU and a slow resampling of the texts themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from pipeline.evaluate.intervals import bleu_counts, bleu_of, difference, interval
from pipeline.evaluate.metrics import score
from pipeline.evaluate.protocols import get_protocol
from shards.errors import DataError

PROTOCOL = get_protocol("default")
WORDS = ["der", "wind", "weht", "schwach", "im", "norden", "regen", "morgen", ".", "und"]
text = st.lists(st.sampled_from(WORDS), min_size=0, max_size=12).map(" ".join)
reference = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


def sentences(count: int, seed: int, kept: float) -> tuple[list[str], list[list[str]]]:
    random = np.random.default_rng(seed)
    references = [" ".join(random.choice(WORDS, random.integers(4, 10))) for _ in range(count)]
    changed = [
        " ".join(word if random.random() < kept else str(random.choice(WORDS)) for word in line.split())
        for line in references
    ]
    return changed, [[line] for line in references]


@given(st.lists(st.tuples(text, st.lists(reference, min_size=1, max_size=2)), min_size=1, max_size=6))
def test_summed_counts_give_sacrebleus_corpus_score(pairs: list[tuple[str, list[str]]]) -> None:
    hypotheses, references = [h for h, _ in pairs], [r for _, r in pairs]
    counts = bleu_counts(hypotheses, references, PROTOCOL)
    streams: Any = [[refs[place] if place < len(refs) else None for refs in references] for place in range(2)]
    expected = BLEU(force=True).corpus_score(hypotheses, streams).score
    assert float(bleu_of(counts.sum(0))) == pytest.approx(expected)
    assert score(hypotheses, references, PROTOCOL).bleu4 == pytest.approx(expected)


def test_a_resample_is_the_corpus_of_the_drawn_sentences() -> None:
    hypotheses, references = sentences(30, 0, 0.6)
    counts = bleu_counts(hypotheses, references, PROTOCOL)
    found = interval(counts[None], resamples=200, seed=3)
    random = np.random.default_rng(3)
    slow = []
    for times in random.multinomial(30, np.full(30, 1 / 30), size=200):
        drawn = [number for number, count in enumerate(times) for _ in range(count)]
        score = BLEU(force=True).corpus_score([hypotheses[n] for n in drawn], [[references[n][0] for n in drawn]])
        slow.append(score.score)
    low, high = np.percentile(slow, [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.low < found.score < found.high and str(found) == f"{found.score:.1f} ({low:.1f} to {high:.1f})"


def test_the_paired_test_agrees_with_sacrebleus() -> None:
    references = sentences(80, 1, 1.0)[1]
    better, worse = sentences(80, 1, 0.8)[0], sentences(80, 1, 0.72)[0]
    counts = [bleu_counts(hypotheses, references, PROTOCOL)[None] for hypotheses in (better, worse)]
    found = difference(counts[0], counts[1], resamples=2000)
    theirs = PairedTest(
        [("worse", worse), ("better", better)], {"BLEU": BLEU(force=True, references=[[r[0] for r in references]])},
        references=None, test_type="bs", n_samples=2000,
    )()[1]["BLEU"][1]  # fmt: skip
    assert found.p == pytest.approx(theirs.p_value, abs=0.03)
    assert found.score == pytest.approx(bleu_of(counts[0].sum((0, 1))) - bleu_of(counts[1].sum((0, 1))))


def test_seeds_of_a_system_are_resampled_alike() -> None:
    hypotheses, references = sentences(40, 2, 0.7)
    one = bleu_counts(hypotheses, references, PROTOCOL)
    same = difference(np.stack([one, one]), one[None])
    assert (same.score, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_other_sentences_cannot_be_compared() -> None:
    one = bleu_counts(*sentences(4, 0, 0.5), PROTOCOL)
    with pytest.raises(DataError, match="a system with 4 sentences is compared with one of 3"):
        difference(one[None], one[None, :3])
