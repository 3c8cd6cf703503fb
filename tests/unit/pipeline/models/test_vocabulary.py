"""More words for a model: one piece each, spelled back, old ids and old texts as before, rows the mean of old ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from launch.slt import app
from pipeline.config.schema import LlmConfig, TinyLlm
from pipeline.errors import RecipeError
from pipeline.models import vocabulary
from pipeline.models.language import load_llm, load_tokenizer
from pipeline.models.vocabulary import extend, read_words
from tests.unit.pipeline.models.tiny import CORPUS, bpe_tokenizer

WORDS = ["schönes", "Regenwetter", "Regen", "morgens"]
TEXT = "here it rains tomorrow, ja"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def sentencepiece_like(folder: Path, kind: str) -> None:
    """A unigram or BPE model over ``▁`` words with byte fallback, as sentencepiece makes; one token added later."""
    model: Any = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = sorted(SPECIAL.values())
    if kind == "unigram":
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special + fallback, show_progress=False)
    model.train_from_iterator(CORPUS * 20, trainer)
    if kind == "bpe":  # byte fallback pieces are ordinary ones
        content = json.loads(model.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
        model = Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL)
    tokenizer.add_tokens(["<later>"])
    tokenizer.save_pretrained(folder)


def model_of(kind: str, folder: Path, tied: bool = True) -> Path:
    """A tiny model with random tables, and rows to spare for two ids."""
    (bpe_tokenizer(folder) if kind == "bytes" else sentencepiece_like(folder, kind))
    sizes = TinyLlm(width=16, layers=1, heads=2, feed_forward=16, max_positions=64)
    llm = load_llm(LlmConfig(tiny=sizes, tokenizer=str(folder)), torch.float32)
    llm.config.tie_word_embeddings = tied
    llm = AutoModelForCausalLM.from_config(llm.config)
    llm.resize_token_embeddings(len(load_tokenizer(LlmConfig(path=str(folder)))) + 2, mean_resizing=False)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.normal_()
    llm.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_words_become_single_pieces(kind: str, tied: bool, tmp_path: Path) -> None:
    source = model_of(kind, tmp_path / "llm", tied)
    new = extend(str(source), WORDS, tmp_path / "more")
    assert new.keys() == set(WORDS)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "more"))
    for word in WORDS:
        text = f"here {word} it"
        ids = after.encode(text, add_special_tokens=False)
        assert ids.count(new[word]) == 1 and after.decode(ids).strip() == text
        assert len(ids) < len(before.encode(text, add_special_tokens=False))
    assert after.encode(TEXT) == before.encode(TEXT), "other texts stay as they are"
    assert all(after.get_vocab()[token] == at for token, at in before.get_vocab().items())
    assert after.eos_token_id == before.eos_token_id
    check_rows(kind, source, tmp_path / "more", tied, new)


def check_rows(kind: str, source: Path, out: Path, tied: bool, new: dict[str, int]) -> None:
    old, more = (AutoModelForCausalLM.from_pretrained(path) for path in (source, out))
    before = AutoTokenizer.from_pretrained(source)
    assert more.config.vocab_size == more.get_input_embeddings().num_embeddings > max(new.values())
    assert (more.get_output_embeddings().weight is more.get_input_embeddings().weight) == tied
    form = before.backend_tokenizer.model.tokenize(("Ġ" if kind == "bytes" else "▁") + "Regen")
    assert len(form) > 1
    for table in ("get_input_embeddings", "get_output_embeddings"):
        rows, grown = getattr(old, table)().weight, getattr(more, table)().weight
        assert torch.equal(grown[: len(before)], rows[: len(before)])
        assert torch.allclose(grown[new["Regen"]], rows[[token.id for token in form]].mean(0), atol=1e-6)
    ids = torch.tensor([before.encode(TEXT)])
    assert torch.allclose(old(ids).logits[..., : len(before)], more(ids).logits[..., : len(before)], atol=1e-6)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_a_language_without_spaces(kind: str, tmp_path: Path) -> None:
    source = model_of(kind, tmp_path / "llm")
    new = extend(str(source), ["天气", "明天"], tmp_path / "more", spaces=False)
    after = load_tokenizer(LlmConfig(path=str(tmp_path / "more")))
    ids = after.encode("今天明天气", add_special_tokens=False) if kind == "unigram" else after.encode("今明天天气")
    assert set(new.values()) & set(ids), "within a text, not behind a space"


def test_known_words_are_left_alone(tmp_path: Path) -> None:
    source = model_of("unigram", tmp_path / "llm")
    again = extend(str(source), ["Regen", "Regen"], tmp_path / "more")
    assert extend(str(tmp_path / "more"), ["Regen"], tmp_path / "third") == {} and len(again) == 1
    sizes = [AutoModelForCausalLM.from_pretrained(tmp_path / name).config.vocab_size for name in ("more", "third")]
    assert sizes[0] == sizes[1] == AutoModelForCausalLM.from_pretrained(source).config.vocab_size, "spare rows are used"


def test_what_cannot_be_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = str(model_of("bytes", tmp_path / "llm")), tmp_path / "more"
    with pytest.raises(RecipeError, match="'a b' is no word: give words without spaces, one per line"):
        extend(source, ["a b"], out)
    with pytest.raises(RecipeError, match=r"\"it's\": the tokenizer cuts it into \['Ġit', \"'s\"\] before it looks"):
        extend(source, ["it's"], out)
    monkeypatch.setattr(vocabulary.NewPieces, "_merge", lambda *_: None)
    with pytest.raises(RecipeError, match="does not make one piece of these words, or spells them otherwise: Regen"):
        extend(source, ["Regen"], out)
    monkeypatch.undo()
    monkeypatch.setattr(vocabulary.NewPieces, "_place_added_tokens", lambda _: None)
    with pytest.raises(RecipeError, match="gives old tokens other ids when it is loaded again: <later>; it cannot"):
        extend(str(model_of("bpe", tmp_path / "other")), ["Regen"], out)
    assert {path.name for path in tmp_path.iterdir()} == {"llm", "other"}
    out.mkdir()
    with pytest.raises(RecipeError, match="more exists; remove it, or name a new folder"):
        extend(source, ["Regen"], out)


def test_a_tokenizer_of_whole_words_is_refused(tmp_path: Path) -> None:
    model = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="a WordLevel tokenizer takes no further words; use a model with a BPE"):
        extend(str(tmp_path), ["b"], tmp_path / "out")


def test_words_come_from_a_file_and_the_command_names_their_ids(tmp_path: Path) -> None:
    source, words, out = model_of("bytes", tmp_path / "llm"), tmp_path / "words.txt", tmp_path / "more"
    with pytest.raises(RecipeError, match=r"words\.txt cannot be read as UTF-8 text: .*; give a file with one word"):
        read_words(words)
    words.write_text("\n \n")
    with pytest.raises(RecipeError, match=r"words\.txt holds no words; give one per line"):
        read_words(words)
    words.write_text("Regen\n\n schnee \n", encoding="utf-8")
    result = CliRunner().invoke(app, ["vocab", "extend", str(source), "--words", str(words), "--out", str(out)])
    assert result.exit_code == 0
    ids = load_tokenizer(LlmConfig(path=str(out))).get_vocab()
    assert result.stdout.splitlines() == [f"{ids['ĠRegen']}\tRegen", f"{ids['Ġschnee']}\tschnee", str(out)]
