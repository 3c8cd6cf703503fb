"""Texts of other splits that also occur in train: one rule for reports, figures, lint and ``contamination``.

Two texts are the same if they differ only in case, white space and punctuation around words
(:func:`shards.text.fold_text`). Without a train split the answer is unknown: None.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.filter.dedup import text_hashes
from shards.text import fold_text

TRAIN = "train"


def folded_hash(text: str) -> int:
    """64 bits, equal for texts that are the same; 0 for a text without words."""
    folded = fold_text(text)
    return int(text_hashes([folded])[0]) if folded else 0


def shared(hashes: NDArray[np.uint64], train: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """bool [D]: which of these :func:`folded_hash` are also in train."""
    return np.isin(hashes, train) & (hashes != 0)


def shared_with_train(table: pa.Table) -> NDArray[np.bool_] | None:
    """bool [samples] of an index: samples of other splits whose text occurs in train; None without a train split."""
    splits = np.asarray(table["split"].to_pylist(), dtype=object)
    in_train = splits == TRAIN
    if not in_train.any():
        return None
    hashes = np.fromiter(map(folded_hash, table["text"].to_pylist()), np.uint64, table.num_rows)
    return shared(hashes, hashes[in_train]) & ~in_train


def counted(splits: Iterable[str], table: pa.Table) -> dict[str, int | None]:
    """Samples of each split but train whose text occurs in train; None without a train split."""
    is_shared = shared_with_train(table)
    names = np.asarray(table["split"].to_pylist(), dtype=object)
    return {
        split: None if is_shared is None else int(is_shared[names == split].sum()) for split in splits if split != TRAIN
    }
