"""Pseudo-glosses by frequency, by part of speech (with stand-ins of the taggers), in scripts without spaces."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from shards.errors import DataError, OptionError
from shards.exchange.pseudo_gloss import GlossOptions, pseudo_glosses
from shards.filter.content_words import Word, splitter
from shards.format.index import fingerprint, read_index, rows_to_table, write_index
from shards.format.text_columns import open_column
from tests.unit.shards.making import save_tokenizer
from tests.unit.shards.shard_sets import write_videos

TEXTS = ["The dog sleeps.", "the Cat sleeps", "the bird, the tree", "The dog sings a song", "the fox", "of the dog!"]
SPLITS = ["train"] * 4 + ["dev"] * 2


def set_of(folder: Path, texts: list[str] = TEXTS, **columns: list[str]) -> Path:
    write_videos(folder, [b"x"] * len(texts), [4] * len(texts))
    shard_set = read_index(folder)
    values = {"split": SPLITS[: len(texts)], "text": texts, **columns}
    rows = [row._replace(**{key: of[n] for key, of in values.items()}) for n, row in enumerate(shard_set.rows())]
    table = rows_to_table(rows)
    shard_set.manifest.splits = {split: values["split"].count(split) for split in set(values["split"])}
    shard_set.manifest.fingerprint = fingerprint(shard_set.manifest.shards, table)
    write_index(folder, table, shard_set.manifest)
    return folder


def glosses(folder: Path, options: GlossOptions, name: str = "pseudo_gloss") -> list[list[str]]:
    pseudo_glosses(folder, options, name)
    column = open_column(read_index(folder), name)
    return [column.texts(row) for row in range(len(column))]


def test_frequent_words_go_and_training_alone_decides(tmp_path: Path) -> None:
    folder = set_of(tmp_path / "set")
    options = GlossOptions(max_share=0.5)
    assert glosses(folder, options) == [
        ["dog sleeps"],
        ["cat sleeps"],
        ["bird tree"],
        ["dog sings a song"],
        [],
        ["dog"],
    ]
    (figures,) = pseudo_glosses(folder, options, replace=True).values()
    assert (figures.texts, figures.empty, figures.words, figures.kept) == (6, 1, 20, 11)
    assert (figures.vocabulary, figures.unknown) == (8, 2) and figures.left_out == ["the"]
    assert figures.frequent[:2] == ["dog", "sleeps"]
    twice = GlossOptions(max_share=0.5, min_texts=2, dropped=("Sleeps",))
    assert glosses(folder, twice, "twice") == [["dog"], [], [], ["dog"], [], ["dog"]]
    assert GlossOptions().most == 0.2 and GlossOptions(splitter="spacy").most == 1.0


def test_each_language_has_its_own_choice(tmp_path: Path) -> None:
    folder = set_of(tmp_path / "set", language=["en", "en", "de", "de", "de", "de"])
    assert glosses(folder, GlossOptions(max_share=0.5))[:3] == [["dog"], ["cat"], ["bird tree"]]
    apart = set_of(tmp_path / "apart", language=["en"] * 4 + ["fr"] * 2)
    with pytest.raises(DataError, match=r"apart: no training text with language 'fr', so no word can be chosen"):
        pseudo_glosses(apart, GlossOptions())


def test_scripts_without_spaces_by_characters_and_by_pieces(tmp_path: Path) -> None:
    assert splitter("words")(["今天下雨。"]) == [[Word(c) for c in "今天下雨"]]
    tokenizer = tmp_path / "tokenizer"
    save_tokenizer(tokenizer)
    (found,) = splitter("tokenizer", str(tokenizer))(["Rain, today!"])
    assert found and all(word.text and word.text == word.text.casefold() and "," not in word.text for word in found)


class _Stub(types.ModuleType):
    def __init__(self, name: str, **values: Any) -> None:
        super().__init__(name)
        self.__dict__.update(values)


def _tagged(text: str) -> list[Any]:
    tags = {"the": "DET", "dog": "NOUN", "dogs": "NOUN", "sleep": "VERB", ".": "PUNCT"}
    lemmas = {"dogs": "dog", "sleeps": "sleep"}
    words = text.lower().replace(".", " .").split()
    lemma = [lemmas.get(word, word) for word in words]
    return [
        types.SimpleNamespace(text=word, lemma_=of, lemma=of, pos_=tags.get(of, "X"), upos=tags.get(of, "X"))
        for word, of in zip(words, lemma, strict=True)
    ]


def test_taggers_give_lemmas_of_content_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tagger:
        def pipe(self, texts: list[str]) -> list[Any]:
            return [_tagged(text) for text in texts]

        def __call__(self, text: str) -> Any:
            return types.SimpleNamespace(sentences=[types.SimpleNamespace(words=_tagged(text))])

    def load(name: str) -> Tagger:
        if name != "good":
            raise OSError("not there")
        return Tagger()

    def pipeline(name: str, **options: Any) -> Tagger:
        assert options["download_method"] is None, "nothing is downloaded silently"
        if name != "good":
            raise ValueError("not there")
        return Tagger()

    monkeypatch.setitem(sys.modules, "spacy", _Stub("spacy", load=load))
    monkeypatch.setitem(sys.modules, "stanza", _Stub("stanza", Pipeline=pipeline))
    folder = set_of(tmp_path / "set", ["The dogs sleep.", "the dog"])
    for name in ("spacy", "stanza"):
        options = GlossOptions(splitter=name, models={"": "good"})
        assert glosses(folder, options, name) == [["dog sleep"], ["dog"]]
        nouns = GlossOptions(splitter=name, models={"de": "good"}, tags=("NOUN",))
        assert glosses(folder, nouns, f"{name}_nouns") == [["dog"], ["dog"]]
        assert open_column(read_index(folder), name).about["splitter"] == name
    with pytest.raises(DataError, match=r"no spaCy model 'other' \(not there\)\n  fix: python -m spacy download other"):
        splitter("spacy", "other")
    with pytest.raises(DataError, match=r"no Stanza model for 'other' \(not there\)"):
        splitter("stanza", "other")


def test_jieba_segments_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(text: str) -> list[Any]:
        flags = {"今天": "t", "的": "uj", "雨": "n", "。": "x"}
        return [types.SimpleNamespace(word=word, flag=flag) for word, flag in flags.items() if word in text]

    monkeypatch.setitem(sys.modules, "jieba", _Stub("jieba"))
    monkeypatch.setitem(sys.modules, "jieba.posseg", _Stub("jieba.posseg", cut=cut))
    assert splitter("jieba")(["今天的雨。"]) == [[Word("今天", "NOUN"), Word("的", "ADP"), Word("雨", "NOUN")]]


def test_a_splitter_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"no splitter 'mecab'\n  fix: known: words, tokenizer, jieba, spacy, stanza"):
        splitter("mecab")
    with pytest.raises(OptionError, match=r"--model: spacy needs a model"):
        splitter("spacy")
    monkeypatch.setitem(sys.modules, "jieba.posseg", None)
    with pytest.raises(DataError, match=r"jieba is not installed\n  fix: pip install jieba, or use --splitter words"):
        splitter("jieba")
