"""Word error rate of recognised glosses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shards.errors import DataError


@dataclass(frozen=True, slots=True)
class WordErrors:
    """Of a whole split."""

    errors: int
    """Substitutions, deletions and insertions."""
    words: int
    """Words of the references."""
    samples: int

    @property
    def wer(self) -> float:
        """Errors per reference word, in percent; above 100 if there are more errors than words."""
        return 100.0 * self.errors / self.words


def word_errors(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> WordErrors:
    """Errors of a split: the sum over samples of `edits`, not a mean of their rates.

    Raises:
        DataError: other numbers of hypotheses and references, or no reference word at all.
    """
    if len(hypotheses) != len(references):
        raise DataError(
            f"{len(hypotheses)} hypotheses but {len(references)} references",
            where="word error rate",
            fix="pass exactly one reference per hypothesis, in the same order",
        )
    words = sum(map(len, references))
    if not words:
        raise DataError(
            "the references hold no word", where="word error rate", fix="score a split whose samples have glosses"
        )
    errors = sum(edits(*pair) for pair in zip(hypotheses, references, strict=True))
    return WordErrors(errors, words, len(references))


def edits(hypothesis: Sequence[str], reference: Sequence[str]) -> int:
    """The fewest substitutions, deletions and insertions between two sequences (Levenshtein 1966)."""
    row = list(range(len(reference) + 1))
    for place, word in enumerate(hypothesis, 1):
        diagonal, row[0] = row[0], place
        for at, other in enumerate(reference, 1):
            diagonal, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, diagonal + (word != other))
    return row[-1]
