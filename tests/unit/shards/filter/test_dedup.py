"""Hashes, MinHash estimates and near duplicates against definitions written out in plain Python."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.filter import dedup
from shards.filter.dedup import Signatures, WordHasher, bands, first_of_equals, near_duplicates, similarity, text_hashes
from shards.text import fold_text


def grams(text: str, words: int) -> set[tuple[str, ...]]:
    parts = text.split()
    return {tuple(parts[at : at + words]) for at in range(max(1, len(parts) - words + 1))}


def jaccard(left: str, right: str, words: int) -> float:
    a, b = grams(left, words), grams(right, words)
    return len(a & b) / len(a | b)


def documents(number: int, length: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 7))) for _ in range(2000)]
    return [" ".join(rng.choices(words, k=length)) for _ in range(number)]


def changed(text: str, places: int, rng: random.Random) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), places):
        words[place] = f"new{rng.random()}"
    return " ".join(words)


def test_folding() -> None:
    assert fold_text('  He said: "Go,\tnow!"  ') == "he said go now" == fold_text("HE SAID GO NOW.")
    assert fold_text("Größe ﬁn Ⅷ") == "grösse fin viii"
    assert fold_text("今天天气，很好。ok") == "今 天 天 气 很 好 ok"
    assert fold_text("don't 3.5 -- !") == "don't 3.5" and fold_text(" ?! ") == ""
    assert fold_text("हिन्दी में।") == "हिन्दी में", "vowel signs belong to the word"


@given(st.lists(st.text(alphabet="ab cé今", max_size=30), max_size=8), st.integers(1, 4))
def test_equal_word_ngrams_have_equal_hashes(texts: list[str], words: int) -> None:
    folded = [text for text in map(fold_text, texts) if text]
    found: dict[int, set[int]] = {number: set() for number in range(len(folded))}
    for hashes, owners in WordHasher(words).blocks(folded):
        assert hashes.dtype == np.uint64 and (np.diff(owners) >= 0).all()
        for value, owner in zip(hashes.tolist(), owners.tolist(), strict=True):
            found[owner].add(value)
    for number, text in enumerate(folded):
        expected = grams(text, words)
        assert len(found[number]) == len(expected)
        for other in range(number):
            assert len(found[number] & found[other]) == len(expected & grams(folded[other], words))


def test_texts_longer_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    text = documents(1, 5000)[0]
    whole = {value for hashes, _ in WordHasher(3).blocks([text]) for value in hashes.tolist()}
    monkeypatch.setattr(dedup, "_PIECE_BYTES", 4096)
    hasher = WordHasher(3)
    blocks = list(hasher.blocks(["one", text, "x" * 20_000, "two three four"]))
    assert len(blocks) > 4 and {owner for _, owners in blocks for owner in owners.tolist()} == {0, 1, 2, 3}
    pieces = {value for hashes, owners in blocks for value in hashes[owners == 1].tolist()}
    assert pieces <= whole and len(whole - pieces) <= 2 * len(text) // 4096 + 2
    signatures = Signatures(3, 64)
    signatures.append(["one", text, "x" * 20_000, "two three four"])
    monkeypatch.undo()
    at_once = Signatures(3, 64)
    at_once.append([text])
    assert similarity(signatures.array()[1:2], at_once.array())[0] > 0.9


def test_estimates_are_unbiased_and_independent_of_blocks() -> None:
    rng = random.Random(1)
    left = documents(300, 60)
    right = [changed(text, rng.randint(0, 12), rng) for text in left]
    one, two, single = Signatures(3, 128), Signatures(3, 128), Signatures(3, 128)
    one.append(left)
    two.append(right)
    for text in left[:20]:
        single.append([text])
    assert (single.array() == one.array()[:20]).all()
    true = np.array([jaccard(a, b, 3) for a, b in zip(left, right, strict=True)])
    error = similarity(one.array(), two.array()) - true
    expected = np.sqrt((true * (1 - true)).mean() / 128)
    assert abs(error.mean()) < 0.01 and np.sqrt((error**2).mean()) < 1.3 * expected


def test_hashes_never_change() -> None:
    """They decide what is stored: another value would make another shard set from the same corpus."""
    signatures = Signatures(2, 8)
    signatures.append(["der regen kommt", "die sonne"])
    assert signatures.array().tolist() == [
        [111, 76, 113, 202, 14, 20, 202, 106],
        [113, 248, 172, 155, 82, 57, 140, 189],
    ]
    assert text_hashes(["der regen"]).tolist() == [9720634057317387105]


def test_first_of_equals() -> None:
    assert first_of_equals(np.array([5, 3, 5, 5, 3, 1], dtype=np.uint64)).tolist() == [True, True] + [False] * 3 + [
        True
    ]
    assert first_of_equals(np.array([], dtype=np.uint64)).tolist() == []


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_bring_similar_texts_together(threshold: float) -> None:
    number, rows = bands(threshold, 128)
    assert number * rows <= 128 and 1 - (1 - threshold**rows) ** number >= 0.99


def test_near_duplicates_are_like_an_earlier_text_that_stays() -> None:
    rng = random.Random(2)
    texts = documents(600, 50, seed=4)
    copies = [changed(text, 1, rng) for text in texts[:100]] + texts[100:150]
    far = [changed(text, 15, rng) for text in texts[150:250]]
    everything = texts + copies + far
    signatures = Signatures(3, 128)
    signatures.append(everything)
    stored = signatures.array()
    chosen = np.arange(len(everything))
    gone = near_duplicates(stored, chosen, 0.7)
    assert gone[600:750].mean() > 0.97 and not gone[:600].any() and not gone[750:].any()
    for number in np.flatnonzero(gone):
        kept = np.flatnonzero(~gone[:number])
        estimates = similarity(np.repeat(stored[number : number + 1], len(kept), 0), stored[kept])
        assert estimates.max() >= 0.7
    part = np.array([650, 50, 3])  # only these are compared, in this order
    assert near_duplicates(stored, part, 0.7).tolist() == [False, True, False]
    assert near_duplicates(stored, part[:0], 0.7).tolist() == []


def test_a_chain_stays_where_its_ends_differ() -> None:
    """a ~ b ~ c, a unlike c: b goes for a; c stays, since b did not."""
    rng = random.Random(0)
    a = documents(1, 100)[0]
    b = changed(a, 6, rng)
    c = " ".join([*b.split()[:82], *[f"z{n}" for n in range(18)]])
    signatures = Signatures(1, 256)
    signatures.append([a, b, c])
    stored = signatures.array()
    estimate = {(i, j): similarity(stored[[i]], stored[[j]])[0] for i in range(3) for j in range(3)}
    threshold = 0.7
    assert min(estimate[0, 1], estimate[1, 2]) >= threshold > estimate[0, 2]
    assert near_duplicates(stored, np.arange(3), threshold).tolist() == [False, True, False]


def test_a_crowd_of_equal_texts() -> None:
    signatures = Signatures(3, 128)
    signatures.append(["liebe zuschauer guten abend"] * 5000 + documents(50, 30))
    gone = near_duplicates(signatures.array(), np.arange(5050), 0.8)
    assert gone[1:5000].all() and not gone[0] and not gone[5000:].any()
