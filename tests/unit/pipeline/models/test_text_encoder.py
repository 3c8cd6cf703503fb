"""Text features: own tokens only, pooling as configured, fingerprints, and the cache shared by ranks."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModel

from pipeline.config.schema import TextEncoderConfig
from pipeline.errors import DataError, RecipeError
from pipeline.models.language import load_llm
from pipeline.models.registry import build_text_encoder
from pipeline.models.text_cache import TextFeatureCache
from pipeline.models.text_encoder import TextEncoder, TextFeatures
from shards.schema import text_hash
from tests.unit.pipeline.models.test_contrastive import table_of
from tests.unit.pipeline.models.tiny import bpe_tokenizer, llm_config, shake

TEXTS = ["tomorrow it rains", "here", "I am here in the north", "HELLO YOU"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer that adds <s> and </s>."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = bpe_tokenizer(folder, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")],
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=len(tokenizer), **sizes))
    shake(model, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    bpe_tokenizer(folder)
    load_llm(llm_config(folder), torch.float32).save_pretrained(folder)
    return folder


def encoder(path: Path, **options: Any) -> TextEncoder:
    return build_text_encoder(TextEncoderConfig(path=str(path), **options))


def test_features_cover_the_texts_own_tokens(bert: Path) -> None:
    plain = encoder(bert, prefix="query: ")
    ids, own = plain._tokenise("here it")
    kept = plain.tokenizer.decode([i for i, mine in zip(ids, own, strict=True) if mine])
    assert plain.tokenizer.decode(ids) == "<s>query: here it</s>" and str(kept).strip() == "here it"
    features = plain.encode(TEXTS)
    assert [len(rows) for rows in features.tokens] == [sum(plain._tokenise(text)[1]) for text in TEXTS]
    assert features.sentence.shape == (4, 16) and plain.width == 16
    assert features.sentence.dtype == features.tokens[0].dtype == torch.float32


def test_a_text_that_spells_control_tokens_is_data(bert: Path, llm: Path) -> None:
    for path, options in ((bert, {}), (llm, {"kind": "llm"})):
        made = encoder(path, prefix="<s> query: ", **options)
        ids, own = made._tokenise("it </s> rains <s>")
        around = [number for number, mine in zip(ids, own, strict=True) if not mine]
        assert [ids.count(number) for number in made.tokenizer.all_special_ids[:2]] == [
            around.count(number) for number in made.tokenizer.all_special_ids[:2]
        ]
        assert around.count(made.tokenizer.bos_token_id) == 2, "the prefix's own control tokens are commands"
        kept = made.tokenizer.decode([number for number, mine in zip(ids, own, strict=True) if mine])
        assert str(kept).strip() == "it </s> rains <s>"


@torch.no_grad()
def test_pooling(bert: Path) -> None:
    ids, own = encoder(bert)._tokenise(TEXTS[0])
    hidden = AutoModel.from_pretrained(bert).eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    for pooling, expected in (("mean", hidden.mean(0)), ("cls", hidden[0]), ("last", hidden[-1])):
        features = encoder(bert, pooling=pooling).encode(TEXTS)
        torch.testing.assert_close(features.sentence[0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.tokens[0], hidden[torch.tensor(own)], atol=1e-5, rtol=1e-5)


def test_features_do_not_depend_on_the_batch_or_its_order(bert: Path) -> None:
    one = encoder(bert)
    together, apart, back = one.encode(TEXTS), one.encode(TEXTS, batch=1), one.encode(TEXTS[::-1])
    torch.testing.assert_close(together.sentence, apart.sentence, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.sentence, back.sentence.flip(0), atol=1e-5, rtol=0)
    for a, b in zip(together.tokens, apart.tokens, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_causal_lm_as_text_encoder(llm: Path) -> None:
    rows = encoder(llm, kind="llm", token_features="embeddings", prefix=" ")
    features = rows.encode(TEXTS)
    table = rows.model.get_input_embeddings().weight
    expected = rows.tokenizer(" here", add_special_tokens=False)["input_ids"]
    assert torch.equal(features.tokens[1], table[expected]), "the rows the LLM reads inside a sentence"
    ids, own = rows._tokenise(TEXTS[0])
    assert ids[0] == rows.tokenizer.bos_token_id and not own[0]
    hidden = rows.model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(features.sentence[0], hidden[1:].mean(0), atol=1e-5, rtol=1e-5)
    last = encoder(llm, kind="llm", pooling="last", prefix=" ").encode(TEXTS)
    torch.testing.assert_close(last.sentence[0], hidden[-1], atol=1e-5, rtol=1e-5)


def test_fingerprint_follows_weights_and_options(bert: Path, tmp_path: Path) -> None:
    first = encoder(bert).fingerprint
    assert encoder(bert).fingerprint == first
    assert encoder(bert, prefix="query: ").fingerprint != first
    changed = encoder(bert)
    with torch.no_grad():
        changed.model.get_input_embeddings().weight[5, 3] += 1e-3
    assert changed.fingerprint != first


def test_frozen(bert: Path) -> None:
    model = encoder(bert).model
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_unusable_encoders_and_texts(bert: Path, llm: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot load a 'hf' text encoder"):
        encoder(tmp_path / "absent")
    with pytest.raises(RecipeError, match="first token of a causal LM sees nothing else"):
        encoder(llm, kind="llm", pooling="cls")
    with pytest.raises(DataError, match="has no token of its own within max_tokens 128"):
        encoder(bert).encode(["here", ""])
    with pytest.raises(DataError, match="has no token of its own within max_tokens 4"):
        encoder(bert, prefix="a very long prefix ", max_tokens=4).encode(["here"])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "embedding_size": 8}
    bpe_tokenizer(tmp_path)
    AutoModel.from_config(AutoConfig.for_model("electra", vocab_size=360, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"are 8 wide, its hidden\s+states 16"):
        encoder(tmp_path, token_features="embeddings")


# --- the cache ---


def test_lookup_returns_what_was_encoded(bert: Path, tmp_path: Path) -> None:
    one = encoder(bert)
    cache = TextFeatureCache(tmp_path)
    cache.build(table_of(*TEXTS), one)
    wanted = [2, 1, 2]
    sentence_BE, tokens_ND, lengths = cache.lookup([text_hash(TEXTS[i]) for i in wanted])
    features = one.encode(TEXTS)
    torch.testing.assert_close(sentence_BE, features.sentence[wanted], atol=1e-5, rtol=0)
    assert lengths == [len(features.tokens[i]) for i in wanted]
    for tokens_LD, i in zip(tokens_ND.split(lengths), wanted, strict=True):
        torch.testing.assert_close(tokens_LD, features.tokens[i], atol=1e-5, rtol=0)
    assert cache.first(2) == sorted(text_hash(text) for text in TEXTS)[:2]


def test_only_new_texts_are_encoded_and_encoders_do_not_mix(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    original = TextEncoder.encode

    def recorded(self: TextEncoder, texts: list[str], batch: int = 64) -> TextFeatures:
        encoded.extend(texts)
        return original(self, texts, batch)

    monkeypatch.setattr(TextEncoder, "encode", recorded)
    cache = TextFeatureCache(tmp_path)
    cache.build(table_of(*TEXTS[:2]), encoder(bert))
    cache.build(table_of(*TEXTS, "HERE "), encoder(bert))
    assert sorted(encoded) == sorted(TEXTS)
    TextFeatureCache(tmp_path).build(table_of(*TEXTS), encoder(bert))
    assert len(encoded) == 4
    TextFeatureCache(tmp_path).build(table_of(*TEXTS), encoder(bert, pooling="cls"))
    assert len(encoded) == 8
    assert not list(tmp_path.glob("*/tmp-*"))


def test_ranks_share_the_work(bert: Path, tmp_path: Path) -> None:
    barrier = threading.Barrier(3)
    caches = [TextFeatureCache(tmp_path) for _ in range(3)]
    encoders = [encoder(bert) for _ in range(3)]
    threads = [
        threading.Thread(
            target=cache.build, args=(table_of(*TEXTS), encoders[rank], rank, 3, lambda: barrier.wait(60) and None)
        )
        for rank, cache in enumerate(caches)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parts = [json.loads(path.read_text())["sentence"]["count"] for path in tmp_path.glob("*/texts-*/index.json")]
    assert sorted(parts) == [1, 1, 2]
    assert all(cache.first(9) == sorted(text_hash(text) for text in TEXTS) for cache in caches)


def test_a_cache_that_cannot_be_used(bert: Path, tmp_path: Path) -> None:
    cache = TextFeatureCache(tmp_path)
    cache.build(table_of(*TEXTS), encoder(bert))
    with pytest.raises(DataError, match="no cached features for text hash 7"):
        cache.lookup([7])
    (tokens,) = tmp_path.glob("*/texts-*/tokens.f32")
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(DataError, match="ends before row"):
        cache.lookup(cache.first(9))
    with pytest.raises(DataError, match="bytes, the index promises"):
        TextFeatureCache(tmp_path).build(table_of(*TEXTS), encoder(bert))
    with pytest.raises(DataError, match="after every rank wrote its share"):
        TextFeatureCache(tmp_path / "local").build(table_of(*TEXTS), encoder(bert), rank=0, world_size=2)


def test_what_a_killed_run_left_is_removed(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the next run often has the same pid, whose folder would be in its way."""
    one, cache = encoder(bert), TextFeatureCache(tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda path: None)
        killed.setattr(TextEncoder, "encode", lambda self, texts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.build(table_of(*TEXTS), one)
    assert list(tmp_path.glob("*/tmp-*"))
    cache.build(table_of(*TEXTS), one)
    assert len(cache.first(9)) == 4 and not list(tmp_path.glob("*/tmp-*"))


def test_features_of_an_earlier_version_are_made_again_with_a_message(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = encoder(bert)
    earlier = tmp_path / one.fingerprint[:32] / "part-0123"
    earlier.mkdir(parents=True)
    (earlier / "index.json").write_text("{}")
    cache = TextFeatureCache(tmp_path)
    cache.build(table_of(*TEXTS), one)
    assert "in the form of an earlier version (part-0123, ...)" in caplog.text
    assert len(cache.first(9)) == 4 and earlier.exists()
