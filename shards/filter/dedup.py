"""Finds duplicates among millions of texts: hashes and MinHash signatures in flat arrays, computed in blocks of texts.

Exact duplicates have the same :func:`shards.text.fold_text`. Near duplicates share most of their word n-grams: MinHash
(Broder 1997) estimates the share, banding (Leskovec et al., Mining of Massive Datasets, 3.4) finds the pairs worth
estimating, and a text is dropped only if the estimate with an earlier, kept text reaches the threshold.

Hashes depend on the text alone: equal on every machine, for every block size and library version.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

LOWEST_THRESHOLD = 0.5
"""Below it bands get so short that unrelated texts collide in them."""
_SIGNATURE_VALUES = 256
_PIECE_BYTES = 1 << 19
"""Longer texts are hashed in pieces of about this size, which bounds the memory."""
_ROUNDS = 64
"""A text is compared with at most this many earlier texts of a band's bucket."""
_SURE = 0.99
_COMPARED_AT_ONCE = 1 << 16
_BASE = 0x9E3779B97F4A7C15


def text_hashes(folded: Sequence[str]) -> np.ndarray:
    """uint64 [D]: one hash per folded text; two of 100 million texts collide with probability 0.0003."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in folded)
    return np.frombuffer(digests, dtype="<u8")


def first_of_equals(hashes: np.ndarray) -> np.ndarray:
    """bool [D]: whether no earlier entry has the same value."""
    first = np.zeros(len(hashes), dtype=bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first


class WordHasher:
    """Hashes of the word n-grams of folded texts: polynomial hashes of byte spans, differences of prefix sums."""

    def __init__(self, words: int) -> None:
        self.words = words
        self._byte_values = _mixed(np.arange(1, 257, dtype=np.uint64) * np.uint64(_BASE))
        self._powers = _power_table(_BASE, _PIECE_BYTES)
        self._inverses = _power_table(pow(_BASE, -1, 1 << 64), _PIECE_BYTES)

    def blocks(self, folded: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(hashes uint64 [G], text number int64 [G]) of bounded groups of texts; numbers never decrease.

        A text of fewer words than an n-gram has one hash, of all its words. An n-gram across the cut of a very long
        text is left out.
        """
        rows: list[bytes] = []
        owners: list[int] = []
        size = 0
        for number, text in enumerate(folded):
            for piece in _pieces(text.encode()):
                if rows and size + len(piece) >= _PIECE_BYTES:
                    yield self._hash(rows, owners)
                    rows, owners, size = [], [], 0
                rows.append(piece)
                owners.append(number)
                size += len(piece) + 1
        if rows:
            yield self._hash(rows, owners)

    def _hash(self, rows: list[bytes], owners: list[int]) -> tuple[np.ndarray, np.ndarray]:
        data = np.frombuffer(b"\n".join(rows) + b"\n", dtype=np.uint8)
        if len(data) > len(self._powers):  # one word longer than a piece
            self._powers = _power_table(_BASE, len(data))
            self._inverses = _power_table(pow(_BASE, -1, 1 << 64), len(data))
        prefix = np.zeros(len(data) + 1, dtype=np.uint64)
        np.cumsum(self._byte_values[data] * self._powers[: len(data)], out=prefix[1:])
        ends = np.flatnonzero((data == 32) | (data == 10))
        starts = np.concatenate([[0], ends[:-1] + 1])
        closes = data[ends] == 10
        row = np.cumsum(closes) - closes
        last_word = np.flatnonzero(closes)[row]
        word = np.arange(len(ends))
        first_word = np.concatenate([[0], np.flatnonzero(closes)[:-1] + 1])[row]
        chosen = (word + self.words - 1 <= last_word) | (word == first_word)
        begin, number = starts[chosen], row[chosen]
        end = ends[np.minimum(word + self.words - 1, last_word)[chosen]]
        hashes = _mixed((prefix[end] - prefix[begin]) * self._inverses[begin])
        return hashes, np.asarray(owners)[number]


class Signatures:
    """MinHash signatures of texts, one byte per permutation (b-bit MinHash, Li and Koenig 2010), appended in order."""

    def __init__(self, words: int, permutations: int) -> None:
        """``words`` per n-gram; the estimate's standard deviation is ``sqrt(s (1 - s) / permutations)``."""
        self.permutations = permutations
        self._hasher = WordHasher(words)
        values = _mixed(np.arange(permutations, dtype=np.uint64) + np.uint64(_BASE))
        self._factors = values.astype(np.uint32) | np.uint32(1)
        self._offsets = (values >> np.uint64(32)).astype(np.uint32)
        self._stored = bytearray()

    def append(self, folded: Sequence[str]) -> None:
        """Add the signatures of these texts."""
        minima = np.full((self.permutations, len(folded)), np.iinfo(np.uint32).max, dtype=np.uint32)
        for hashes, owners in self._hasher.blocks(folded):
            low = hashes.astype(np.uint32)
            starts = np.flatnonzero(np.diff(owners, prepend=-1))
            texts = owners[starts]
            values = np.empty_like(low)
            for number in range(self.permutations):
                np.multiply(low, self._factors[number], out=values)
                np.add(values, self._offsets[number], out=values)
                smallest = np.minimum.reduceat(values, starts)
                minima[number, texts] = np.minimum(minima[number, texts], smallest)
        # The minimum itself is small for long texts: its bits are mixed before one byte is kept.
        kept = (minima * np.uint32(0x9E3779B1)) >> np.uint32(24)
        self._stored += np.ascontiguousarray(kept.T, dtype=np.uint8).tobytes()

    def array(self) -> np.ndarray:
        """uint8 [D, permutations], a view: append nothing while it is in use."""
        return np.frombuffer(self._stored, dtype=np.uint8).reshape(-1, self.permutations)


def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimated share of common n-grams (Jaccard) of signature rows uint8 [D, permutations]; float64 [D]."""
    equal = (left == right).mean(axis=1)
    return (equal - 1 / _SIGNATURE_VALUES) / (1 - 1 / _SIGNATURE_VALUES)


def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows per band): the longest bands that bring together 99 % of the pairs at the threshold."""
    fitting = [
        rows
        for rows in range(1, permutations + 1)
        if 1 - math.pow(1 - math.pow(threshold, rows), permutations // rows) >= _SURE
    ]
    rows = max(fitting, default=1)
    return permutations // rows, rows


def near_duplicates(signatures: np.ndarray, chosen: np.ndarray, threshold: float) -> np.ndarray:
    """Which texts are near duplicates of an earlier, kept text.

    Args:
        signatures: uint8 [D, permutations].
        chosen: int64 [C], the texts to compare, in order; the others are ignored.
        threshold: estimated similarity, 0.5..1.

    Returns:
        bool [C].
    """
    number, rows = bands(threshold, signatures.shape[1])
    pairs = np.empty(0, dtype=np.int64)
    for band in range(number):
        keys = _band_keys(signatures[:, band * rows : (band + 1) * rows], chosen)
        band_pairs = _pairs_of_band(signatures, chosen, keys, threshold)
        pairs = np.union1d(pairs, band_pairs)
    dropped = np.zeros(len(chosen), dtype=bool)
    # Sorted by the later text, so that the fate of the earlier one is known when its pair is reached.
    for later, earlier in zip(*(part.tolist() for part in np.divmod(pairs, max(1, len(chosen)))), strict=True):
        if not dropped[earlier]:
            dropped[later] = True
    return dropped


def _band_keys(columns: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """uint64 [C]: equal for equal rows of the band."""
    width = -(-columns.shape[1] // 8) * 8
    padded = np.zeros((len(chosen), width), dtype=np.uint8)
    padded[:, : columns.shape[1]] = columns[chosen]
    keys = np.zeros(len(chosen), dtype=np.uint64)
    for part in padded.view("<u8").T:
        keys = _mixed(keys + part)
    return keys


def _pairs_of_band(signatures: np.ndarray, chosen: np.ndarray, keys: np.ndarray, threshold: float) -> np.ndarray:
    """``later * C + earlier`` of texts in one bucket that are similar: each is compared with the bucket's first text,
    and those unlike it with the first of the rest, and so on."""
    order = np.argsort(keys, kind="stable")
    bucket = np.cumsum(np.diff(keys[order], prepend=keys[order[:1]]) != 0)
    pairs = []
    for _ in range(_ROUNDS):
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        sizes = np.diff(np.append(starts, len(bucket)))
        leaders = np.repeat(order[starts], sizes)
        rest = (leaders != order) & (np.repeat(sizes, sizes) > 1)
        order, bucket, leaders = order[rest], bucket[rest], leaders[rest]
        if not len(order):
            break
        similar = np.concatenate(
            [
                similarity(signatures[chosen[order[part]]], signatures[chosen[leaders[part]]]) >= threshold
                for start in range(0, len(order), _COMPARED_AT_ONCE)
                for part in [slice(start, start + _COMPARED_AT_ONCE)]
            ]
        )
        pairs.append(order[similar] * len(chosen) + leaders[similar])
        order, bucket = order[~similar], bucket[~similar]
    return np.concatenate(pairs) if pairs else np.empty(0, dtype=np.int64)


def _pieces(encoded: bytes) -> Iterator[bytes]:
    """The text in parts of at most ``_PIECE_BYTES``, cut between words."""
    start = 0
    while len(encoded) - start >= _PIECE_BYTES:
        cut = encoded.rfind(b" ", start, start + _PIECE_BYTES)
        if cut <= start:
            cut = encoded.find(b" ", start)
        if cut < 0:
            break
        yield encoded[start:cut]
        start = cut + 1
    yield encoded[start:]


def _power_table(base: int, length: int) -> np.ndarray:
    """uint64 [length]: ``base ** i`` modulo 2**64."""
    table = np.ones(length, dtype=np.uint64)
    filled = 1
    while filled < length:
        step = min(filled, length - filled)
        table[filled : filled + step] = table[:step] * np.uint64(pow(base, filled, 1 << 64))
        filled += step
    return table


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit changes half of the output bits."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
