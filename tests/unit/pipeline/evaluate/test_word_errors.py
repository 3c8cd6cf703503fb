from __future__ import annotations

import random
from functools import cache

import pytest

from pipeline.evaluate.word_errors import edits, word_errors
from shards.errors import DataError


def by_recursion(hypothesis: tuple[str, ...], reference: tuple[str, ...]) -> int:
    """The definition, word by word from the end."""

    @cache
    def of(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = hypothesis[i - 1] == reference[j - 1]
        return of(i - 1, j - 1) if same else 1 + min(of(i - 1, j), of(i, j - 1), of(i - 1, j - 1))

    return of(len(hypothesis), len(reference))


def test_edits_equal_the_recursion() -> None:
    generator = random.Random(0)
    pairs = [tuple(tuple(generator.choices("abc", k=generator.randint(0, 8))) for _ in range(2)) for _ in range(200)]
    for hypothesis, reference in pairs:
        assert edits(hypothesis, reference) == by_recursion(hypothesis, reference)


def test_the_rate_is_over_all_words() -> None:
    """Not the mean of the samples' rates: 1 of 1 and 1 of 4."""
    found = word_errors([["B"], ["A", "B", "C"], []], [["A"], ["A", "B", "C", "D"], []])
    assert (found.errors, found.words, found.samples, found.wer) == (2, 5, 3, 40.0)


def test_more_errors_than_words() -> None:
    assert word_errors([["A", "B", "C"]], [["D"]]).wer == 300.0


def test_other_numbers_of_samples() -> None:
    with pytest.raises(DataError, match=r"(?s)word error rate: 2 hypotheses but 1 references.*exactly one reference"):
        word_errors([[], []], [[]])


def test_no_words() -> None:
    with pytest.raises(DataError, match=r"(?s)the references hold no word.*samples have glosses"):
        word_errors([["A"]], [[]])
