"""Evaluation sentences that stand in the texts a language model was trained on.

Reads the index of text sets, at most :data:`MOST` documents: the warning has to come before a run starts, not after.
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
    """How many samples have a text that a training document is equal to, or was made from by a template."""

    samples: int
    known: int = 0
    example: str = ""
    documents: int = 0
    """Training documents that were looked at."""
    complete: bool = True
    """Whether these were all."""


def known_texts(texts: Sequence[str], sources: Iterable[tuple[Folder, str]], most: int = MOST) -> KnownTexts:
    """Count the evaluation texts that occur in training documents.

    Args:
        texts: one per sample.
        sources: text sets with the split that was trained on.
        most: look at so many documents.

    Raises:
        DataError: an index that cannot be read.
    """
    wanted: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        if number := folded_hash(text):
            wanted.setdefault(number, []).append(place)
    found = KnownTexts(len(texts))
    for document, inside in _documents(sources):
        if found.documents == most:
            found.complete = False
            break
        found.documents += 1
        for number in (folded_hash(document), *map(folded_hash, inside)):
            if places := wanted.pop(number, []):
                found.known += len(places)
                found.example = found.example or texts[places[0]]
    return found


def _documents(sources: Iterable[tuple[Folder, str]]) -> Iterable[tuple[str, list[str]]]:
    """Documents of the splits, each with the sentences inside it."""
    for folder, split in sources:
        sentences = set_sentences(folder)
        for block in shard_set_texts(folder):
            if block.split == split:
                for text in block.texts:
                    yield text, sentences.of(text)
