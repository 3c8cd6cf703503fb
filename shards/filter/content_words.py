"""The words of a text that a sign may stand for, found with or without a tagger: what pseudo-glosses are made of.

Splitters cut a text into words, each with its part of speech where one is known (Universal POS tags). spaCy, Stanza and
jieba are used where they are installed; nothing here needs them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from shards.errors import DataError, OptionError
from shards.text import fold_text, load_tokenizer


class Word(NamedTuple):
    """One word of a text."""

    text: str
    """Its lemma where the splitter knows it, else the word; in folded case, without punctuation around it."""
    tag: str = ""
    """Universal POS tag; empty where none is known."""


Splitter = Callable[[Sequence[str]], list[list[Word]]]
"""The words of every text."""

CONTENT_TAGS = ("NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM", "PRON", "X")
"""Parts of speech that are kept unless others are asked for: without articles, prepositions, auxiliaries, particles."""
TAGGERS = ("spacy", "stanza", "jieba")
_JIEBA_TAGS = {"n": "NOUN", "v": "VERB", "a": "ADJ", "d": "ADV", "m": "NUM", "r": "PRON", "t": "NOUN", "s": "NOUN"}
_JIEBA_TAGS |= {
    "f": "NOUN",
    "z": "ADJ",
    "b": "ADJ",
    "i": "X",
    "l": "X",
    "j": "NOUN",
    "e": "X",
    "x": "PUNCT",
    "w": "PUNCT",
}
_INSTALL = {"spacy": "pip install spacy", "stanza": "pip install stanza", "jieba": "pip install jieba"}
_UNSEEN = re.compile(r"^[▁Ġ#@\s]+|[@\s]+$")


def splitter(name: str, model: str = "") -> Splitter:
    """The splitter of a name.

    Args:
        name: ``words`` (white space; every character in scripts without spaces), ``tokenizer`` (a language model's
            pieces), ``jieba``, ``spacy`` or ``stanza``.
        model: folder of the tokenizer, name of the spaCy model, or language of the Stanza one.

    Raises:
        OptionError: no such splitter, or it needs a model.
        DataError: the package or model is not installed.
    """
    makers: dict[str, Callable[[str], Splitter]] = {
        "words": _spaced, "tokenizer": _pieces, "jieba": _jieba, "spacy": _spacy, "stanza": _stanza,
    }  # fmt: skip
    if name not in makers:
        raise OptionError(f"no splitter {name!r}", where="--splitter", fix=f"known: {', '.join(makers)}")
    if not model and name in ("tokenizer", "spacy", "stanza"):
        raise OptionError(f"{name} needs a model", where="--model", fix="name a tokenizer folder, model or language")
    return makers[name](model)


def _folded(words: Sequence[tuple[str, str]]) -> list[Word]:
    """Words in folded case; those that are only punctuation go."""
    found = [(fold_text(text).replace(" ", ""), tag) for text, tag in words]
    return [Word(text, tag) for text, tag in found if text and tag not in ("PUNCT", "SYM", "SPACE")]


def _spaced(model: str) -> Splitter:
    del model
    return lambda texts: [[Word(word) for word in fold_text(text).split()] for text in texts]


def _pieces(model: str) -> Splitter:
    tokenizer = load_tokenizer(model)

    def split(texts: Sequence[str]) -> list[list[Word]]:
        found = []
        for text in texts:
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            found.append(_folded([(_UNSEEN.sub("", text[a:b]), "") for a, b in offsets]))
        return found

    return split


def _jieba(model: str) -> Splitter:
    del model
    segment = _module("jieba.posseg", "jieba")

    def split(texts: Sequence[str]) -> list[list[Word]]:
        pairs = [[(pair.word, _JIEBA_TAGS.get(pair.flag[:1], "ADP")) for pair in segment.cut(text)] for text in texts]
        return [_folded(words) for words in pairs]

    return split


def _spacy(model: str) -> Splitter:
    package = _module("spacy", "spacy")
    try:
        tagger = package.load(model)
    except OSError as error:
        fix = f"python -m spacy download {model}, or name another"
        raise DataError(f"no spaCy model {model!r} ({error})", where="--model", fix=fix) from error
    return lambda texts: [_folded([(token.lemma_, token.pos_) for token in text]) for text in tagger.pipe(texts)]


def _stanza(model: str) -> Splitter:
    package = _module("stanza", "stanza")
    try:
        tagger = package.Pipeline(model, processors="tokenize,pos,lemma", download_method=None, verbose=False)
    except Exception as error:  # Stanza raises several kinds for a language that was not downloaded
        fix = f"stanza.download({model!r}), or name another"
        raise DataError(f"no Stanza model for {model!r} ({error})", where="--model", fix=fix) from error

    def split(texts: Sequence[str]) -> list[list[Word]]:
        read = (tagger(text) for text in texts)
        return [_folded([(w.lemma or w.text, w.upos or "") for s in text.sentences for w in s.words]) for text in read]

    return split


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        fix = f"{_INSTALL[package]}, or use --splitter words"
        raise DataError(f"{package} is not installed", where="--splitter", fix=fix) from error
