"""A corpus without harmful texts: too short, too long, in another language, duplicated, or leaked.

:func:`filtered` wraps any corpus. Segments keep their order and number; excluded ones have the reason in ``excluded``,
so that a build counts them. Decisions need the whole corpus: the first call of ``segments`` reads it once (twice with
contamination), keeps only hashes, and reads it again to yield.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from shards.errors import DataError, OptionError
from shards.filter.dedup import Signatures, first_of_equals, near_duplicates, text_hashes
from shards.filter.options import FilterOptions
from shards.filter.overlap import ContaminationReport, EvaluationTexts
from shards.filter.rules import REASONS, TextRules, language_library
from shards.filter.shared_texts import TRAIN
from shards.filter.sources import evaluation_texts, identity, set_sentences, shard_set_texts
from shards.filter.template_texts import Sentences
from shards.schema import Corpus, Segment
from shards.storage.store import Folder
from shards.text import fold_text

logger = logging.getLogger(__name__)
DUPLICATE, NEAR_DUPLICATE, CONTAMINATION = "duplicate", "near_duplicate", "contamination"
_REASONS = ("", *REASONS, CONTAMINATION, DUPLICATE, NEAR_DUPLICATE)
_BLOCK, _BLOCK_CHARACTERS = 512, 1 << 22
_ADVICE = "add --filter against_text=COLUMN"


def filtered(corpus: Corpus, options: FilterOptions) -> Filtered:
    """``corpus`` with a reason in ``Segment.excluded`` of every text that a rule excludes.

    Args:
        corpus: of any kind; must yield the same segments each time.
        options: the rules.

    Raises:
        DataError: an unknown language, or unreadable evaluation texts. Iterating raises DataError if the corpus yields
            other segments than before, and OptionError if the rules have nothing to work on: no such split, or no
            evaluation texts.
    """
    return Filtered(corpus, options)


class Filtered:
    """See :func:`filtered`. Has the optional attributes of a corpus that the wrapped one has."""

    def __init__(self, corpus: Corpus, options: FilterOptions) -> None:
        self.corpus, self.options = corpus, options
        self.name = corpus.name
        self._rules = TextRules(options)
        recorded = options.record()
        if options.languages:
            recorded["language_library"] = language_library()
        if options.against:
            recorded["against"] = sorted(map(identity, options.against))  # by content: the folder may move
        self.settings: dict[str, object] = {**getattr(corpus, "settings", {}), "filter": recorded}
        for name in ("published", "max_skipped_fraction", "notes"):
            if hasattr(corpus, name):
                setattr(self, name, getattr(corpus, name))
        self._decided: _Decisions | None = None

    def segments(self) -> Iterator[Segment]:
        """The corpus's segments in its order; the first call decides."""
        decided = self._decisions()
        position = 0
        for number, segments in enumerate(_blocks(self.corpus.segments())):
            if decided.digests[number : number + 1] != [_digest(segments)]:
                raise self._changed()
            for segment in segments:
                reason = _REASONS[decided.codes[position]]
                yield replace(segment, excluded=reason) if reason else segment
                position += 1
        if position != len(decided.codes):
            raise self._changed()

    def report(self) -> dict[str, object]:
        """Number of segments, of exclusions per rule, and the contamination report; reads the corpus if needed."""
        decided = self._decisions()
        counts = Counter(decided.codes)
        excluded = {_REASONS[code]: number for code, number in sorted(counts.items()) if code}
        report: dict[str, object] = {"segments": len(decided.codes), "excluded": excluded}
        if decided.contamination is not None:
            report["contamination"] = decided.contamination.to_dict()
        return report

    def _decisions(self) -> _Decisions:
        if self._decided is None:
            logger.info("reading the texts of %s to decide which are filtered", self.name)
            self._decided = _decide(self.corpus, self.options, self._rules)
        return self._decided

    def _changed(self) -> DataError:
        return DataError(
            "yields other segments than when its texts were judged",
            where=f"corpus {self.name}",
            fix="do not change the files during a build; report a corpus that is not deterministic",
        )


class _Decisions:
    """The first pass: one byte per segment, and per candidate its hash and signature."""

    def __init__(self) -> None:
        self.codes = bytearray()
        self.digests: list[bytes] = []
        self.contamination: ContaminationReport | None = None


class _Candidates:
    """The texts of one split, to be searched for duplicates."""

    def __init__(self, options: FilterOptions) -> None:
        self.positions, self.hashes = array("Q"), array("Q")
        near = options.near_duplicates > 0
        self.signatures = Signatures(options.near_duplicate_words, options.permutations) if near else None

    def append(self, positions: list[int], folded: list[str]) -> None:
        self.positions.extend(positions)
        self.hashes.frombytes(text_hashes(folded).tobytes())
        if self.signatures is not None:
            self.signatures.append(folded)

    def mark(self, codes: bytearray, options: FilterOptions) -> None:
        """Write the codes of the duplicates."""
        positions = np.frombuffer(self.positions, dtype=np.uint64)
        first = first_of_equals(np.frombuffer(self.hashes, dtype=np.uint64))
        view = np.frombuffer(codes, dtype=np.uint8)
        if options.exact_duplicates:
            view[positions[~first]] = _REASONS.index(DUPLICATE)
        if self.signatures is not None:
            chosen = np.flatnonzero(first) if options.exact_duplicates else np.arange(len(first))
            gone = near_duplicates(self.signatures.array(), chosen, options.near_duplicates)
            view[positions[chosen[gone]]] = _REASONS.index(NEAR_DUPLICATE)


def _decide(corpus: Corpus, options: FilterOptions, rules: TextRules) -> _Decisions:
    decided = _Decisions()
    sentences = Sentences(getattr(corpus, "settings", {}).get("templates", ()))
    evaluation, exclude = _evaluation(corpus, options, sentences)
    candidates: dict[str, _Candidates] = {}
    splits: dict[str, None] = {}
    for segments in _blocks(corpus.segments()):
        decided.digests.append(_digest(segments))
        splits.update(dict.fromkeys(segment.split for segment in segments))
        start = len(decided.codes)
        decided.codes += bytes(len(segments))
        folded = {
            number: fold_text(segment.text)
            for number, segment in enumerate(segments)
            if not segment.excluded and segment.text.strip()
        }
        judged = [number for number in folded if segments[number].split in options.splits]
        for number in judged:
            reason = rules.reason(segments[number].text, folded[number])
            decided.codes[start + number] = _REASONS.index(reason)
        if evaluation is not None:
            for number in _leaked(segments, folded, evaluation, sentences, decided.codes[start:]):
                if exclude:
                    decided.codes[start + number] = _REASONS.index(CONTAMINATION)
        by_split: dict[str, list[int]] = {}
        for number in judged:
            if folded[number] and not decided.codes[start + number]:
                by_split.setdefault(segments[number].split, []).append(number)
        if options.exact_duplicates or options.near_duplicates:
            for split, numbers in by_split.items():
                if split not in candidates:
                    candidates[split] = _Candidates(options)
                candidates[split].append([start + number for number in numbers], [folded[number] for number in numbers])
    missing = [split for split in options.splits if split not in splits]
    if missing:
        raise OptionError(
            f"the corpus has no split {', '.join(map(repr, missing))} to filter; it has {', '.join(splits) or 'none'}",
            where="--filter splits",
            fix=f"add --filter splits={','.join(splits) or 'train'}",
        )
    for split_candidates in candidates.values():
        split_candidates.mark(decided.codes, options)
    if evaluation is not None:
        decided.contamination = evaluation.report()
    return decided


def _leaked(
    segments: list[Segment],
    folded: dict[int, str],
    evaluation: EvaluationTexts,
    sentences: Sentences,
    codes: bytearray,
) -> list[int]:
    """Numbers of the block's training texts, not yet excluded, that occur in evaluation texts."""
    train = [number for number in folded if folded[number] and segments[number].split == TRAIN and not codes[number]]
    texts = [segments[number].text for number in train]
    origins = [segments[number].origin or segments[number].id for number in train]
    hits = evaluation.check([folded[number] for number in train], texts, origins, list(map(sentences.of, texts)))
    return [number for number, hit in zip(train, hits.tolist(), strict=True) if hit]


def _evaluation(corpus: Corpus, options: FilterOptions, sentences: Sentences) -> tuple[EvaluationTexts | None, bool]:
    """(the evaluation texts, or None if contamination is off; whether contaminated texts are excluded)."""
    mode = options.contamination_mode
    if mode == "off":
        return None, False
    evaluation = EvaluationTexts(options.contamination_words, options.contamination_overlap)
    for location in options.against:
        for block in evaluation_texts(location, column=options.against_text, advice=_ADVICE):
            evaluation.add(block.split, block.texts, block.origins)
    text_only = True
    for segments in _blocks(corpus.segments()):
        text_only &= all(segment.media is None for segment in segments)
        others = [segment for segment in segments if segment.split != TRAIN and not segment.excluded]
        for split in dict.fromkeys(segment.split for segment in others):
            part = [segment for segment in others if segment.split == split]
            texts = [sentences.inner(segment.text) for segment in part]
            evaluation.add(split, texts, [segment.origin or segment.id for segment in part])
    if not len(evaluation):
        raise OptionError(
            f"contamination={mode}, but there are no evaluation texts",
            where="--filter",
            fix="add --filter against=FILE_OR_SHARD_SET, or build with another split than train",
        )
    return evaluation, mode == "exclude" or (mode == "auto" and text_only)


def contamination(
    train: Iterable[Folder],
    evaluation: Iterable[str],
    words: int = 8,
    overlap: float = 0.8,
    column: str = "text",
) -> ContaminationReport:
    """Evaluation texts that occur in the training texts of finished shard sets.

    Args:
        train: shard sets whose ``train`` split is searched.
        evaluation: shard sets or text files; none: the other splits of the training sets.
        words: per n-gram.
        overlap: part of an evaluation text's n-grams that must occur in one training text.
        column: field or column of the text in text files.

    Raises:
        DataError: something cannot be read, or there are no evaluation or no training texts.
    """
    options = FilterOptions(contamination_words=words, contamination_overlap=overlap)
    folders, overlaps = list(train), EvaluationTexts(options.contamination_words, options.contamination_overlap)
    locations = list(evaluation)
    for location in locations or [folder.location for folder in folders]:
        # no set is compared with itself
        for block in evaluation_texts(location, bool(locations), column, "add --against-text COLUMN"):
            overlaps.add(block.split, block.texts, block.origins)
    if not len(overlaps):
        raise DataError(
            "no evaluation texts: no split but train",
            where="evaluation",
            fix="give --against: text files or shard sets",
        )
    for folder in folders:
        sentences = set_sentences(folder)
        for block in shard_set_texts(folder):
            folded = {number: text for number, locations in enumerate(block.texts) if (text := fold_text(locations))}
            if block.split == TRAIN:
                texts = [block.texts[number] for number in folded]
                origins = [block.origins[number] for number in folded]
                overlaps.check(list(folded.values()), texts, origins, list(map(sentences.of, texts)))
    if not overlaps.train_texts:
        raise DataError("no training texts", where="train", fix="name shard sets with a train split")
    return overlaps.report()


def _blocks(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Groups that are hashed together, bounded in number and in characters."""
    block: list[Segment] = []
    characters = 0
    for segment in segments:
        block.append(segment)
        characters += len(segment.text)
        if len(block) == _BLOCK or characters >= _BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _digest(segments: list[Segment]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for segment in segments:
        digest.update(f"{segment.id}\0{segment.split}\0{segment.text}\0".encode())
    return digest.digest()
