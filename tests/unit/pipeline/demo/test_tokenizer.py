"""The demo's tokenizer: a Hugging Face folder, complete or absent, trained once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.demo.tokenizer import train_tokenizer

PLACES, WEATHER = ["north", "south", "east", "west", "coast"], ["rain", "snow", "fog", "sun", "wind"]
DAYS = ["today", "tomorrow", "tonight", "on monday", "on friday", "soon", "at noon", "later"]
TEXTS = [f"{day} there is {weather} in the {place}" for day in DAYS for weather in WEATHER for place in PLACES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("demo") / "tokenizer"
    assert len(TEXTS) == 200
    assert train_tokenizer(TEXTS, target, vocabulary=400) == target
    return target


def test_it_loads_by_auto_class_and_returns_every_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        0, 1, 2, 3,
    )  # fmt: skip
    assert 260 < len(tokenizer) <= 400, "256 bytes, four special tokens and merges"
    for text in (*TEXTS[::37], "Schnee in Köln, 12°C"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids, "bytes spell what is unknown"
    frequent = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert len(frequent) < len(TEXTS[0]) / 2, "words it was trained on are few tokens"


def test_the_second_call_reuses_the_folder(folder: Path) -> None:
    def never() -> Iterator[str]:
        raise AssertionError("the texts are not read again")
        yield

    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer(never(), folder, vocabulary=400) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before


def test_an_interrupted_training_leaves_no_folder(tmp_path: Path) -> None:
    def interrupted() -> Iterator[str]:
        yield from TEXTS[:5]
        raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017  (sentencepiece wraps it)
        train_tokenizer(interrupted(), tmp_path / "tokenizer", vocabulary=400)
    assert not (tmp_path / "tokenizer").exists()
    train_tokenizer(TEXTS, tmp_path / "tokenizer", vocabulary=400)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
