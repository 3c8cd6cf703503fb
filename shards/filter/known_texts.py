"""Finds evaluation sentences in the texts a language model was trained on.

Reads the index of text sets, at most :data:`MOST` documents, so that the warning comes before a run starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shards.filter.shared_texts import folded_hash
from shards.filter.sources import set_sentences, shard_set_texts
from shards.storage.store import Folder

MOST = 2_000_000


@dataclass(slots=True)
class KnownTexts:
    """How many samples have a text that equals a training document or the sentence inside one."""

    samples: int
    known: int = 0
    example: str = ""
    documents: int = 0
    """Training documents that were read."""
    complete: bool = True
    """Whether all were read."""


def known_texts(texts: Sequence[str], sources: Iterable[tuple[Folder, str]], most: int = MOST) -> KnownTexts:
    """Count the evaluation texts that occur in training documents.

    Args:
        texts: one per sample.
        sources: text sets with the split that was trained on.
        most: limit on the documents read.

    Raises:
        DataError: an index that cannot be read.
    """
    places_of: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        if number := folded_hash(text):
            places_of.setdefault(number, []).append(place)
    counts = KnownTexts(len(texts))
    for document, inside in _documents(sources):
        if counts.documents == most:
            counts.complete = False
            break
        counts.documents += 1
        for number in (folded_hash(document), *map(folded_hash, inside)):
            if places := places_of.pop(number, []):
                counts.known += len(places)
                counts.example = counts.example or texts[places[0]]
    return counts


def _documents(sources: Iterable[tuple[Folder, str]]) -> Iterable[tuple[str, list[str]]]:
    """Documents of the splits, each with the sentences inside it."""
    for folder, split in sources:
        sentences = set_sentences(folder)
        for block in shard_set_texts(folder):
            if block.split == split:
                for text in block.texts:
                    yield text, sentences.of(text)
