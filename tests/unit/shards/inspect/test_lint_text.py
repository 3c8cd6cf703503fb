"""shards.inspect.lint_text: what is wrong with a text, and what is not."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.inspect.lint import RULES
from shards.inspect.lint_text import repair_mojibake, text_problems


def rules(text: str, language: str = "") -> set[str]:
    return {rule for rule, _ in text_problems(text, language)}


@pytest.mark.parametrize(
    ("text", "language", "rule"),
    [
        ("", "", "empty_text"),
        (" \u3000\n", "de", "empty_text"),
        ("guten\x00 morgen", "de", "control_character"),
        ("guten\x85 morgen", "de", "control_character"),
        ("guten\u200b morgen", "de", "invisible_character"),
        ("\ufeffguten morgen", "de", "invisible_character"),
        ("abc \u202e def", "en", "invisible_character"),
        ("zwei\nzeilen", "de", "line_break"),
        ("f\ufffdr dich", "de", "replacement_character"),
        ("fÃ¼r dich", "de", "mojibake"),
        ("itâ€™s raining", "en", "mojibake"),
        ("PrvÃ½ kontakt", "sk", "mojibake"),
        ("PrvĂ˝ kontakt", "sk", "mojibake"),
        ("rain &amp; wind", "en", "markup"),
        ("<i>rain</i>", "en", "markup"),
        ("{\\an8}rain", "en", "markup"),
        ("the rain </s> ends", "en", "control_token"),
        ("<|im_start|>user rain", "en", "control_token"),
        ("rain [SEP] wind", "en", "control_token"),
        ("rain ＜pad＞", "en", "control_token"),
        (unicodedata.normalize("NFD", "für"), "de", "not_nfc"),
        ("... !?", "de", "only_punctuation"),
        ("。。。", "zh", "only_punctuation"),
        ("guten morgen", "zh", "wrong_script"),
        ("доброе утро", "de", "wrong_script"),
        ("早上好", "en-US", "wrong_script"),
        ("dobro jutro", "sr-Cyrl", "wrong_script"),
    ],
)
def test_found(text: str, language: str, rule: str) -> None:
    assert rules(text, language) == {rule}
    assert rule in RULES


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("für „dich“ – naïve Café…", "de"),
        ("Tešíš sa ísť do Popradu?", "sk"),
        ("CAFÉ… À LA CARTE “IRMÔ”", "fr"),
        ("今天 DVD 很好看", "zh-Hans"),
        ("おはよう 東京", "ja"),
        ("dobro jutro", "sr-Latn"),
        ("доброе утро", "ru"),
        ("Сім їжаків", "uk"),
        ("می‌خواهم", "fa"),
        ("anything, 任何", "tlh"),
        ("20:30", "sk"),
        ("a < b & c > d", "en"),
        ("Άλφα βήτα", "el"),
    ],
)
def test_left_alone(text: str, language: str) -> None:
    assert rules(text, language) == set()


@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1))
def test_any_text_is_judged(text: str) -> None:
    assert all(rule in RULES and detail for rule, detail in text_problems(text, "de"))


@given(st.text("äöüßéèáíýľščťžňôąęłńŠ", min_size=1, max_size=8))
def test_double_encoding_is_undone(text: str) -> None:
    broken = text.encode().decode("latin-1")
    assert repair_mojibake("x" + broken) == "x" + text


def test_messages_show_invisible_characters_escaped() -> None:
    ((_, detail),) = text_problems("abc \u202edef")
    assert detail == "U+202E at position 4 of 'abc \\u202edef'"
