"""Pseudo-glosses: the content words of every text, as a text column. By part of speech: Sign2GPT (arXiv 2405.04164).

Which words are kept is decided by the training split alone, for each language: by part of speech where the splitter
tags, and by how many texts a word is in. Held-out texts get theirs by the same choice, for scores and comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import DataError
from shards.filter.content_words import CONTENT_TAGS, TAGGERS, Word, splitter
from shards.format.index import ShardSet, read_index
from shards.format.text_columns import write_column

TRAIN = "train"


@dataclass(frozen=True, slots=True)
class GlossOptions:
    """Which words become glosses."""

    splitter: str = "words"
    """As in :func:`shards.filter.content_words.splitter`; so is the model."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Model by language; under the empty key that of all others."""
    tags: tuple[str, ...] = CONTENT_TAGS
    """Parts of speech that are kept, where the splitter tags."""
    min_texts: int = 1
    """Rarer words go: those in fewer training texts."""
    max_share: float | None = None
    """Words in a larger share of the training texts of their language go: function words, mostly. None: 0.2 where the
    splitter does not tag, else 1."""
    dropped: tuple[str, ...] = ()
    """Further words that go."""

    @property
    def most(self) -> float:
        """``max_share`` as it counts."""
        return (1.0 if self.splitter in TAGGERS else 0.2) if self.max_share is None else self.max_share


@dataclass(slots=True)
class GlossFigures:
    """What a column of pseudo-glosses holds, for one language."""

    texts: int = 0
    empty: int = 0
    """Texts of which no word is left."""
    words: int = 0
    kept: int = 0
    vocabulary: int = 0
    """Distinct glosses of the training split."""
    unknown: int = 0
    """Words of held-out texts that are no gloss because no training text has them."""
    frequent: list[str] = field(default_factory=list)
    """The most frequent glosses."""
    left_out: list[str] = field(default_factory=list)
    """The most frequent words that are none."""


def pseudo_glosses(
    folder: Path | str, options: GlossOptions, name: str = "pseudo_gloss", replace: bool = False
) -> dict[str, GlossFigures]:
    """Write the column, and say what it holds by language.

    Raises:
        DataError: no training text, or a splitter that is not there.
    """
    shard_set = read_index(folder)
    languages = shard_set.table["language"].to_pylist()
    glosses: list[list[str]] = [[] for _ in languages]
    figures = {}
    for language in sorted(set(languages)):
        rows = [row for row, of in enumerate(languages) if of == language]
        found, figures[language] = _of_language(shard_set, rows, language, options)
        for row, words in zip(rows, found, strict=True):
            glosses[row] = [" ".join(words)] if words else []
    about = {
        "splitter": options.splitter, "models": dict(options.models), "min_texts": options.min_texts,
        "max_share": options.most, "tags": list(options.tags) if options.splitter in TAGGERS else [],
        "dropped": len(options.dropped),
    }  # fmt: skip
    write_column(shard_set, name, glosses, about, replace=replace)
    return figures


def _of_language(
    shard_set: ShardSet, rows: Sequence[int], language: str, options: GlossOptions
) -> tuple[list[list[str]], GlossFigures]:
    texts, splits = shard_set.table["text"].to_pylist(), shard_set.table["split"].to_pylist()
    model = options.models.get(language, options.models.get("", ""))
    found = splitter(options.splitter, model)([texts[row] for row in rows])
    trained = [words for row, words in zip(rows, found, strict=True) if splits[row] == TRAIN]
    if not trained:
        what = f"no training text with language {language!r}, so no word can be chosen"
        raise DataError(what, where=str(shard_set.dir), fix="make the column on a set with a train split")
    in_texts = Counter(word for words in trained for word in {word.text for word in words})
    dropped = {word.casefold() for word in options.dropped}
    most = max(1.0, options.most * len(trained))
    known = {word for word, number in in_texts.items() if options.min_texts <= number <= most and word not in dropped}

    def keeps(word: Word) -> bool:
        return word.text in known and (not word.tag or word.tag in options.tags)

    glosses = [[word.text for word in words if keeps(word)] for words in found]
    return glosses, _figures(found, glosses, trained, in_texts, keeps)


def _figures(
    found: list[list[Word]],
    glosses: list[list[str]],
    trained: list[list[Word]],
    in_texts: Counter[str],
    keeps: Callable[[Word], bool],
) -> GlossFigures:
    kept = Counter(word.text for words in trained for word in words if keeps(word))
    others = Counter(word.text for words in trained for word in words if not keeps(word))
    return GlossFigures(
        texts=len(glosses),
        empty=sum(not words for words in glosses),
        words=sum(map(len, found)),
        kept=sum(map(len, glosses)),
        vocabulary=len(kept),
        unknown=sum(word.text not in in_texts for words in found for word in words),
        frequent=[word for word, _ in kept.most_common(12)],
        left_out=[word for word, _ in others.most_common(12)],
    )
