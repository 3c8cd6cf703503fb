"""Several texts of one sample: its own, and those of text columns (references of a corpus, paraphrases)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shards.load.draws import Purpose, turn
from shards.order.samples import Samples
from shards.order.shuffle import Ints


def texts_of_sample(samples: Samples, sample: int, own: str, columns: Sequence[str]) -> list[str]:
    """Its own text, then those that text columns have of it, each once.

    Args:
        samples: of a plan whose sources read these columns.
        sample: number in the plan.
        own: the text of its index row.
        columns: names of text columns (:mod:`shards.format.text_columns`).
    """
    return list(dict.fromkeys([own, *(text for column in columns for text in samples.texts(column, sample))]))


def shown_text(texts: Sequence[str], seed: int, sample: int, showing: int) -> str:
    """The text that this showing of a sample is trained with: each has its turn before any comes again."""
    return texts[turn(Purpose.REFERENCE, seed, sample, showing, len(texts))]


def most_of_texts(samples: Samples, columns: Sequence[str], measure: Callable[[str], int]) -> Ints:
    """[n_samples] the largest measure of the texts of every sample; equal texts are measured once."""
    own = samples.column("text").to_pylist()
    found: dict[str, int] = {}

    def largest(texts: Sequence[str]) -> int:
        for text in texts:
            if text not in found:
                found[text] = measure(text)
        return max(map(found.__getitem__, texts))

    several = ([text] if not columns else texts_of_sample(samples, n, text, columns) for n, text in enumerate(own))
    return np.fromiter(map(largest, several), dtype=np.int64, count=len(own))
