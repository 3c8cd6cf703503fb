"""The synthetic corpus in two spoken languages, and as conversations whose pronouns need the sentence before."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import pytest

from shards.corpora.synthetic import Synthetic, SyntheticOptions, generate
from shards.corpora.synthetic_german import NOUNS
from shards.corpora.synthetic_german import translate as in_german
from shards.corpora.synthetic_grammar import (
    LEXICON,
    OBJECTS,
    POINT,
    SUBJECTS,
    Referent,
    follow,
    parts_of,
    sample,
    translate,
)
from shards.errors import DataError

TINY = {"train": 4, "dev": 2, "test": 2, "test_signer": 2, "text_train": 20, "text_dev": 4, "size": 32, "fps": 8.0}


@pytest.mark.parametrize(
    ("signs", "german"),
    [
        ("TEACHER OLD CAR RED BUY", "der alte Lehrer kauft ein rotes Auto"),
        ("YESTERDAY GARDEN MOTHER BALL FIND NOT", "gestern fand meine Mutter den Ball nicht im Garten"),
        ("TOMORROW FRIEND HAPPY WAIT", "morgen wird mein froher Freund warten"),
        ("DOG MANY APPLE MANY BRING", "viele Hunde bringen viele Äpfel"),
        ("TODAY CHILD SMALL BALL BIG LOSE", "heute verliert das kleine Kind den großen Ball"),
        ("YESTERDAY NEIGHBOUR MANY DANCE", "gestern tanzten viele Nachbarinnen"),
        ("NEIGHBOUR OLD LETTER GREEN SELL", "unsere alte Nachbarin verkauft einen grünen Brief"),
    ],
)
def test_german_of_signs(signs: str, german: str) -> None:
    assert in_german(signs.split()) == german


def test_german_tells_apart_what_english_does() -> None:
    rng = random.Random(4)
    texts = {glosses: (text, in_german(glosses)) for text, glosses in (sample(rng) for _ in range(3000))}
    assert (
        len({german for _, german in texts.values()}) == len({english for english, _ in texts.values()}) == len(texts)
    )
    assert set(NOUNS) == {*SUBJECTS, *OBJECTS} and POINT in LEXICON


def test_a_pronoun_is_decided_by_the_sentence_before_alone() -> None:
    said = {
        gloss: (translate((POINT, "CAR", "BUY"), Referent(gloss)), in_german((POINT, "CAR", "BUY"), Referent(gloss)))
        for gloss in SUBJECTS
    }
    assert {english for english, _ in said.values()} == {f"{word} buys a car" for word in ("he", "she", "it")}
    assert {german for _, german in said.values()} == {f"{word} kauft ein Auto" for word in ("er", "sie", "es")}
    assert said["DOG"] == ("it buys a car", "er kauft ein Auto")
    many = Referent("DOG", plural=True)
    assert translate((POINT, "DANCE"), many) == "they dance" and in_german((POINT, "DANCE"), many) == "sie tanzen"
    with pytest.raises(DataError, match=r"'IX DANCE' does not say who is meant\n  fix: give the subject"):
        translate((POINT, "DANCE"))


def test_sentences_that_follow_are_about_the_subject_before() -> None:
    rng = random.Random(1)
    pronouns = defaultdict(set)
    for _ in range(300):
        _, glosses = sample(rng)
        text, signs, referent = follow(rng, glosses)
        before = parts_of(glosses)
        assert (referent.gloss, referent.plural) == (before.subject, before.plural) and POINT in signs
        assert text == translate(signs, referent)
        pronouns[signs].add(next(word for word in text.split() if word in ("he", "she", "it", "they")))
    assert any(len(words) > 1 for words in pronouns.values()), "the same signs, another pronoun"


def test_a_corpus_of_conversations_in_two_languages(tmp_path: Path) -> None:
    options = SyntheticOptions(**TINY, dialogue=2, german=True)  # type: ignore[arg-type]
    generate(tmp_path / "one", options, workers=1)
    generate(tmp_path / "two", options, workers=2)
    segments = list(Synthetic(tmp_path / "one").segments())
    assert [segment.id for segment in segments[:4]] == [
        "train-000000-0", "train-000000-0-de", "train-000000-1", "train-000000-1-de",
    ]  # fmt: skip
    assert {segment.language for segment in segments} == {"en", "de"} and len(segments) == 2 * 10
    english, german = segments[2], segments[3]
    assert english.media == german.media and POINT in english.gloss.split() and english.signer == segments[0].signer
    assert german.text != english.text and english.text.split()[0] != german.text.split()[0]
    held_out = {segment.text for segment in segments if segment.split != "train"}
    assert held_out.isdisjoint({segment.text for segment in segments if segment.split == "train"})
    for name in ("segments.jsonl", "text/train.jsonl", "options.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert '"text_de"' in (tmp_path / "one" / "text" / "dev.jsonl").read_text()
    videos = sorted((tmp_path / "one" / "videos").iterdir())
    assert [path.read_bytes() for path in videos] == [
        (tmp_path / "two" / "videos" / path.name).read_bytes() for path in videos
    ]


def test_options_of_older_corpora_stay() -> None:
    assert not {"dialogue", "german", "poses"} & SyntheticOptions().to_dict().keys()
    assert SyntheticOptions(dialogue=2, german=True).to_dict().items() >= {"dialogue": 2, "german": True}.items()
    with pytest.raises(DataError, match="dialogue is 9, but must lie between 1 and 8 sentences"):
        SyntheticOptions(dialogue=9)
