"""shards.text: templates, pseudo glosses, repetition, token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import DataError
from shards.text import (
    check_template,
    load_tokenizer,
    pseudo_gloss,
    render_pair,
    repeat_words,
    stable_seed,
    token_dtype,
    tokenise,
    tokenizer_fingerprint,
)
from tests.unit.shards.making import save_tokenizer

words = st.lists(st.text(st.characters(categories=["L"]), min_size=1, max_size=6), max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_templates() -> None:
    fields = {"text": "es regnet", "gloss": "REGEN"}
    assert render_pair("{text}", fields) == "es regnet"
    assert render_pair("signs: {gloss} sentence: {text}", fields) == "signs: REGEN sentence: es regnet"


@pytest.mark.parametrize("template", ["{texts}", "plain", "", "{text.__class__}"])
def test_wrong_fields(template: str) -> None:
    with pytest.raises(DataError, match=r"templates: .* uses .*\n  fix: use \{text\} and \{gloss\}"):
        check_template(template)


def test_broken_template() -> None:
    with pytest.raises(DataError, match="is not a template"):
        check_template("{text")


def test_pseudo_gloss_drops_function_words_and_punctuation() -> None:
    assert pseudo_gloss("Der Regen, und die »Sonne« — kommt!", {"der", "und", "die"}) == "Regen Sonne kommt"
    assert pseudo_gloss("und der", {"der", "und"}) == ""


CHINESE = {"我", "我们", "你", "要", "去", "吗", "的", "了", "the"}


@pytest.mark.parametrize(
    ("text", "gloss"),
    [
        ("我要买椅子,你去超市吗？", "买椅子 超市"),
        ("我们的学校，很大。", "学校 很大"),  # the longest function word at a place
        ("气温3.5度了", "气温3.5度"),
        ("我 要 买 椅子", "买 椅子"),
        ("我\u200b要\u200b目的\u200b椅子", "目的 椅子"),  # borders that are shown are not second-guessed
        ("the word 的 and かわいい", "word and かわいい"),
        ("我们喜欢的优の良品牌子很好吃", "喜欢 优の良品牌子很好吃"),
        ("吗？", ""),
    ],
)
def test_pseudo_gloss_of_chinese(text: str, gloss: str) -> None:
    assert pseudo_gloss(text, CHINESE) == gloss


@pytest.mark.parametrize(
    "text",
    [
        "私は学校に行きます。",
        "東京都知事選挙が行われた",
        "ฉันจะไปตลาด",
        "ຂ້ອຍໄປຕະຫຼາດ",
        "ကျွန်တော်ဈေးသွားမယ်",
        "ខ្ញុំទៅផ្សារ",
        "ང་ཁྲོམ་ལ་འགྲོ",
    ],
    ids=["japanese", "mostly_kanji", "thai", "lao", "burmese", "khmer", "tibetan"],
)
def test_pseudo_gloss_without_word_borders_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"a\.txt:3: no word borders in .*\n  fix: segment .* U\+200B .* --gloss FIELD"):
        pseudo_gloss(text, {"は", "จะ"}, "a.txt:3")
    assert pseudo_gloss("ฉัน\u200bจะ\u200bไป", {"จะ"}) == "ฉัน ไป"


def test_pseudo_gloss_keeps_foreign_names_and_signs() -> None:
    assert pseudo_gloss("the ฿100 from ไทย", {"the", "from"}) == "฿100 ไทย"


@given(words, st.integers(0, 2**62), st.integers(1, 5))
def test_repetition_keeps_order_and_is_a_function_of_the_seed(gloss: list[str], seed: int, most: int) -> None:
    text = " ".join(gloss)
    result = repeat_words(text, seed, most)
    assert result == repeat_words(text, seed, most)
    assert set(result.split()) == set(text.split())
    assert len(text.split()) <= len(result.split()) <= most * len(text.split())
    if most == 1:
        assert result == " ".join(text.split())


def test_seeds_are_stable() -> None:
    assert stable_seed(0, "a") == 787122455340873193
    assert len({stable_seed(0, number) for number in range(1000)}) == 1000


def test_documents_have_bos_and_eos(tokenizer: Any) -> None:
    first, second = tokenise(["the rain", ""], tokenizer)
    assert first.tolist() == [2, 3, 5, 1] and second.tolist() == [2, 1]
    assert first.dtype == token_dtype(tokenizer) == np.uint16


def test_no_bos_when_there_is_none(tmp_path: Path) -> None:
    assert tokenise(["rain"], load_tokenizer(save_tokenizer(tmp_path, bos=None)))[0].tolist() == [5, 1]
    assert tokenise(["rain"], load_tokenizer(save_tokenizer(tmp_path / "same", bos="</s>")))[0].tolist() == [5, 1]


def test_large_vocabularies_need_four_bytes(tokenizer: Any) -> None:
    class Large:
        def __len__(self) -> int:
            return 70_000

    assert token_dtype(Large()) == np.uint32


def test_a_tokenizer_without_end_is_refused() -> None:
    class Endless:
        eos_token_id, bos_token_id, name_or_path = None, None, "here"

    with pytest.raises(DataError, match="here: no end-of-sequence token"):
        tokenise(["x"], Endless())


def test_fingerprint_ignores_state_and_sees_vocabulary(tokenizer: Any, tmp_path: Path) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["the rain"], truncation=True, max_length=1, padding=False)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(load_tokenizer(save_tokenizer(tmp_path / "again"))) == before
    assert tokenizer_fingerprint(load_tokenizer(save_tokenizer(tmp_path / "other", bos=None))) != before


def test_a_folder_that_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))
