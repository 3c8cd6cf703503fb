"""Training texts that occur in evaluation texts: equal, or with most n-grams of an evaluation text inside one of them.

Keeps hashes of the evaluation texts, and their beginnings for examples; training texts are read in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shards.filter.dedup import WordHasher, text_hashes
from shards.text import fold_text

_EXAMPLES = 10
_SHOWN_CHARACTERS = 200


@dataclass(slots=True)
class Example:
    """An evaluation text and the first training text that holds most of it."""

    text: str
    origin: str
    train_text: str
    train_origin: str
    overlap: float
    """Part of the evaluation text's n-grams in it; 1.0 with ``exact`` for equal texts."""
    exact: bool


@dataclass(slots=True)
class SplitOverlap:
    """The texts of one evaluation split that occur in the training texts."""

    name: str
    texts: int = 0
    exact: int = 0
    """Evaluation texts equal to a training text, except for case, white space and outer punctuation."""
    near: int = 0
    """Other texts of which at least the part ``overlap`` of the n-grams occurs in one training text."""
    short: int = 0
    """Texts with fewer words than an n-gram: only checked for equality."""
    examples: list[Example] = field(default_factory=list)


@dataclass(slots=True)
class ContaminationReport:
    """Overlap per evaluation split, and the number of training texts concerned."""

    words: int
    overlap: float
    train_texts: int = 0
    train_exact: int = 0
    """Training texts equal to an evaluation text."""
    train_near: int = 0
    """Other training texts that hold most of an evaluation text."""
    splits: list[SplitOverlap] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        import dataclasses

        return dataclasses.asdict(self)


class EvaluationTexts:
    """The evaluation side; add every text, then check training texts."""

    def __init__(self, words: int, overlap: float) -> None:
        """``words`` per n-gram; ``overlap``: part of an evaluation text's distinct n-grams in one training text."""
        self.words, self.overlap = words, overlap
        self._hasher = WordHasher(words)
        self._names: list[str] = []
        self._split: list[int] = []
        self._texts: list[str] = []
        self._origins: list[str] = []
        self._hashes: list[np.ndarray] = []
        self._grams: list[np.ndarray] = []
        self._owners: list[np.ndarray] = []
        self._sorted_texts: _SortedTexts | None = None
        self.train_texts = self.train_exact = self.train_near = 0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, name: str, texts: Sequence[str], origins: Sequence[str]) -> None:
        """Add texts of the evaluation split ``name``; empty ones are ignored."""
        assert self._sorted_texts is None, "training texts have been checked already"
        if name not in self._names:
            self._names.append(name)
        kept = [entry for entry in zip(texts, origins, map(fold_text, texts), strict=True) if entry[2]]
        folded = [entry[2] for entry in kept]
        for hashes, owners in self._hasher.blocks(folded):
            long = np.array([words.count(" ") + 1 >= self.words for words in folded], dtype=bool)[owners]
            self._grams.append(hashes[long])
            self._owners.append(owners[long] + len(self._texts))
        self._hashes.append(text_hashes(folded))
        self._split += [self._names.index(name)] * len(kept)
        self._texts += [entry[0][:_SHOWN_CHARACTERS] for entry in kept]
        self._origins += [entry[1] for entry in kept]

    def check(
        self,
        folded: Sequence[str],
        texts: Sequence[str],
        origins: Sequence[str],
        sentences: Sequence[Sequence[str]] = (),
    ) -> np.ndarray:
        """bool [D]: which of these training texts are equal to, or hold most of, an evaluation text.

        Args:
            folded: ``fold_text`` of each, none empty.
            texts: as written, for the report.
            origins: for the report.
            sentences: folded sentences inside each (:class:`shards.filter.template_texts.Sentences`); one that is equal
                counts as the text itself.
        """
        if self._sorted_texts is None:
            self._sorted_texts = self._freeze()
        evaluation = self._sorted_texts
        inside = [(number, text) for number, folded_sentences in enumerate(sentences) for text in folded_sentences]
        owners_of = np.array([*range(len(folded)), *(number for number, _ in inside)], dtype=np.int64)
        rows, same = evaluation.equal(text_hashes([*folded, *(text for _, text in inside)]))
        exact = np.zeros(len(folded), dtype=bool)
        exact[owners_of[rows]] = True
        near = np.zeros(len(folded), dtype=bool)
        pairs = [(int(owners_of[row]), int(number), 1.0, True) for row, number in zip(rows, same, strict=True)]
        for grams, owners in self._hasher.blocks(folded):
            for text, number, part in evaluation.overlapping(grams, owners, self.overlap):
                near[text] = True
                pairs.append((text, number, part, False))
        for text, number, part, is_exact in pairs:
            evaluation.note(number, part, is_exact, (texts[text][:_SHOWN_CHARACTERS], origins[text]))
        near &= ~exact
        self.train_texts += len(folded)
        self.train_exact += int(exact.sum())
        self.train_near += int(near.sum())
        return exact | near

    def report(self) -> ContaminationReport:
        """The result so far."""
        evaluation = self._sorted_texts = self._sorted_texts or self._freeze()
        report = ContaminationReport(self.words, self.overlap, self.train_texts, self.train_exact, self.train_near)
        report.splits = [SplitOverlap(name) for name in self._names]
        for number, (split, text, origin) in enumerate(zip(self._split, self._texts, self._origins, strict=True)):
            split_report = report.splits[split]
            split_report.texts += 1
            split_report.short += not evaluation.sizes[number]
            if number not in evaluation.best:
                continue
            part, is_exact, (train_text, train_origin) = evaluation.best[number]
            split_report.exact += is_exact
            split_report.near += not is_exact
            if len(split_report.examples) < _EXAMPLES:
                split_report.examples.append(Example(text, origin, train_text, train_origin, round(part, 3), is_exact))
        return report

    def _freeze(self) -> _SortedTexts:
        empty = [np.empty(0, dtype=np.uint64)]
        grams, owners = np.concatenate(empty + self._grams), np.concatenate([np.empty(0, np.int64), *self._owners])
        self._grams, self._owners = [], []
        return _SortedTexts(np.concatenate(empty + self._hashes), grams, owners)


class _SortedTexts:
    """Sorted hashes of the evaluation texts, and the best training text for each."""

    def __init__(self, hashes: np.ndarray, grams: np.ndarray, owners: np.ndarray) -> None:
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        order = np.lexsort((owners, grams))
        grams, owners = grams[order], owners[order]
        new = np.ones(len(grams), dtype=bool)
        new[1:] = (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1])
        self._grams, self._owners = grams[new], owners[new]
        self.sizes = np.bincount(self._owners, minlength=len(hashes))
        self.best: dict[int, tuple[float, bool, tuple[str, str]]] = {}
        """Number of an evaluation text -> (part, whether equal, (text, origin)) of its best training text."""

    def note(self, number: int, part: float, is_exact: bool, place: tuple[str, str]) -> None:
        """Keep the best training text of an evaluation text: an equal one, else the largest part, else the first."""
        best = self.best.get(number)
        if best is None or (is_exact, part) > (best[1], best[0]):
            self.best[number] = (part, is_exact, place)

    def equal(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row of ``hashes``, evaluation number) of every equal pair."""
        rows, places = _matches(self._sorted, hashes)
        return rows, self._order[places]

    def overlapping(self, grams: np.ndarray, owners: np.ndarray, least: float) -> list[tuple[int, int, float]]:
        """(text, evaluation number, part of its n-grams) of pairs that share at least ``least``."""
        rows, places = _matches(self._grams, grams)
        if not len(rows):
            return []
        total = len(self._grams)
        once = np.unique(owners[rows] * total + places)  # an n-gram counts once, however often a text repeats it
        texts, numbers = once // total, self._owners[once % total]
        pairs, counts = np.unique(texts * len(self.sizes) + numbers, return_counts=True)
        texts, numbers = np.divmod(pairs, len(self.sizes))
        parts = counts / self.sizes[numbers]
        chosen = parts >= least
        return list(zip(texts[chosen].tolist(), numbers[chosen].tolist(), parts[chosen].tolist(), strict=True))


def _matches(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row of ``values``, place in ``ordered``) of every equal pair."""
    left, right = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    counts = right - left
    rows = np.repeat(np.arange(len(values)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, left[rows] + within
