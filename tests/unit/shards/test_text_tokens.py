"""shards.text_tokens: no text becomes a control token, every other text keeps its ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from shards.build.build import BuildOptions, build
from shards.corpora.text import Text
from shards.errors import DataError, OptionError
from shards.text import load_tokenizer, tokenise
from shards.text_tokens import TextTokens, _copy
from tests.unit.pipeline.models.tiny import bpe_tokenizer
from tests.unit.shards.making import save_tokenizer

CHARACTERS = sorted(set("▁abcdefghijklmnopqrstuvwxyzAIP<>/|_[]:.,0123456789"))
PLAIN = ["the cat sells a letter", "a < b, b > c", "12 cats: s / pad", "", "  two  spaces ", "unk pad mask"]
SPELLING = ["the cat </s> sells", "<pad>", "<s>a</s>", "a<unk>b", "<<s>>", "</s></s>", "<|im_start|>user <call>"]


def byte_level() -> Any:
    """GPT-2's kind, with special tokens, a control token that is not flagged as one, and a word added later."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        piece: number for number, piece in enumerate([*pieces, "he", "the", "s>", "<s>", "/s", "</s", "</s>"])
    }
    merges = [("h", "e"), ("t", "he"), ("s", ">"), ("<", "s>"), ("/", "s"), ("<", "/s"), ("</s", ">")]
    model.model = models.BPE(vocabulary, merges)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<call>", "letter"])
    return tokenizer


def llama() -> Any:
    """The demo's kind: pieces with byte fallback, merges that would spell the control tokens."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    pieces = [*special, *bytes_, *CHARACTERS, "he", "the", "▁the", "s>", "/s"]
    merges = [("h", "e"), ("t", "he"), ("▁", "the"), ("s", ">"), ("<", "s>"), ("/", "s"), ("</s", ">")]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "</s"])}
    return LlamaTokenizer(vocab=vocabulary, merges=[*merges, ("<", "/s")], pad_token="<pad>")


def unigram() -> Any:
    """XLM-R's kind: control tokens are pieces of the best score, and NFKC."""
    scores = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>")]
    scores += [(piece, -float(number)) for number, piece in enumerate([*CHARACTERS, "▁the", "▁cat"], 5)]
    model = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=False))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    model.decoder = decoders.Metaspace(prepend_scheme="always")
    model.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **names)


KINDS = {"byte_level": byte_level, "llama": llama, "unigram": unigram}


@pytest.fixture(scope="module", params=KINDS)
def reader(request: pytest.FixtureRequest) -> TextTokens:
    return TextTokens(KINDS[request.param]())


@pytest.mark.parametrize("text", [*SPELLING, "the ＜/s＞ end"])
def test_no_control_token_comes_of_a_text_and_nothing_is_lost(reader: TextTokens, text: str) -> None:
    (ids,) = reader.ids([text])
    assert not set(ids) & reader.controls.keys()
    read = str(reader.tokenizer.decode(ids)).strip()
    assert read in (text, text.replace("＜", "<").replace("＞", ">"))


def test_every_other_text_keeps_its_ids(reader: TextTokens) -> None:
    before = reader.tokenizer(PLAIN, add_special_tokens=False)["input_ids"]
    assert reader.ids(PLAIN) == before
    copy = _copy(reader.tokenizer, tuple(reader.controls.items()))
    copy.no_truncation()
    assert [found.ids for found in copy.encode_batch(PLAIN, add_special_tokens=False)] == before
    among = reader.ids([PLAIN[0], SPELLING[0], PLAIN[1]])
    assert [among[0], among[2]] == before[:2]


def test_the_control_tokens_of_a_head_are_commands(reader: TextTokens) -> None:
    eos = reader.tokenizer.eos_token_id
    plain = reader.behind("ask </s> ", "the cat")
    spelled = reader.behind("ask </s> ", "the cat </s>")
    before = len(plain.own) - sum(plain.own)
    assert plain.ids == reader.tokenizer("ask </s> the cat", add_special_tokens=False)["input_ids"]
    assert spelled.ids[: len(plain.ids)] == plain.ids and plain.ids[:before].count(eos) == spelled.ids.count(eos) == 1
    assert spelled.own == [False] * before + [True] * (len(spelled.ids) - before)
    assert str(reader.tokenizer.decode(spelled.ids[before:])).strip() == "the cat </s>"


def test_the_tokens_around_a_text_are_kept_and_count_when_it_is_cut() -> None:
    reader = TextTokens(unigram())
    found = reader.behind("", "the cat </s> sells", special=True, most=6)
    assert found.own == [False, True, True, True, True, False] and (found.ids[0], found.ids[-1]) == (0, 2)
    assert len(reader.behind("", "the cat </s> sells", special=True).ids) > 6, "the limit is that of one call"


def test_what_a_text_spells() -> None:
    reader = TextTokens(byte_level())
    assert reader.spelled("the <call> </s> of <|im_start|> </s> letter") == ["<call>", "</s>", "<|im_start|>"]
    assert reader.spelled("the letter <mask>") == [], "a word that was added, and a token of other tokenizers"
    assert TextTokens(unigram()).spelled("＜/s＞ ß") == ["</s>"], "an unknown character spells nothing"
    assert TextTokens(unigram()).spelled("<unk> ß") == ["<unk>"]


def test_the_names_of_the_copy_are_no_texts() -> None:
    (ids,) = (reader := TextTokens(byte_level())).ids(["\U0010ffff</s>\U0010ffff"])
    assert not set(ids) & reader.controls.keys() and str(reader.tokenizer.decode(ids)) == "\ufffd</s>\ufffd"


def test_words_of_a_vocabulary_that_are_control_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path))
    spelled, plain = tokenise(["the rain </s> the <s>", "the rain"], tokenizer)
    assert spelled.tolist()[1:3] == [3, 5] and spelled.tolist().count(1) == spelled.tolist().count(2) == 1
    assert plain.tolist() == [2, 3, 5, 1]


def test_tokens_that_are_added_later_are_seen(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(tmp_path)
    before = tokenise(["a <end> b"], tokenizer)[0].tolist()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    assert len(tokenizer("a <end> b", add_special_tokens=False)["input_ids"]) < len(before) - 2
    assert tokenise(["a <end> b"], tokenizer)[0].tolist() == before


def test_real_xlm_r(shared_data: Path) -> None:
    folder = shared_data / "models" / "multilingual-e5-small-pruned"
    if not folder.is_dir():
        pytest.skip(f"no text encoder: {folder} does not exist")
    reader = TextTokens(AutoTokenizer.from_pretrained(folder))
    split = reader.tokenizer("the cat </s> sells", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert 2 in split, "what transformers offers is not enough for a unigram model"
    found = reader.behind("query: ", "the cat </s> sells", special=True, most=64)
    assert found.ids.count(2) == 1 and "</s> sells" in str(reader.tokenizer.decode(found.ids[:-1]))


def test_slow_tokenizers_are_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"a slow tokenizer \(ByT5Tokenizer\)(.|\n)*convert it to a tokenizer\.json"):
        tokenise(["the rain"], load_tokenizer(str(tmp_path)))


def test_templates_of_documents_cannot_command(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the rain\n")
    corpus = Text(paths={"train": str(tmp_path / "a.txt")}, templates=["{text}", "<s> sentence: {text}"])
    options = BuildOptions(tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(OptionError, match=r"templates: '<s> sentence: \{text\}' spells the control token '<s>'"):
        build(corpus, tmp_path / "out", options, 1)
