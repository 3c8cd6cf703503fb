"""A model with more words trains under ZeRO-3, and what it exports knows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.schema import LlmConfig
from pipeline.export.hf import export
from pipeline.models.language import load_tokenizer
from pipeline.models.vocabulary import extend
from shards.build.build import BuildOptions, build
from shards.corpora.text import Text
from shards.text import tokenizer_fingerprint
from tests.jobs import World, run_job
from tests.multiproc.test_loaded_ranks import save_llm

pytestmark = pytest.mark.multiproc

STAGE = "continued_pretraining"
WORDS = ["Schneegestöber", "Gebärdensprache"]


def test_new_words_are_trained_and_exported(corpus: World, tmp_path: Path) -> None:
    save_llm(tmp_path / "llm", corpus.tokenizer)
    new = extend(str(tmp_path / "llm"), WORDS, tmp_path / "more")
    assert new.keys() == set(WORDS)
    texts = tmp_path / "texts.jsonl"
    row = json.dumps({"text": "now " + " and ".join(WORDS), "gloss": ""})
    texts.write_text(f"{row}\n" * 200)
    text = Text(paths={"train": str(texts), "dev": str(texts)}, templates=["{text}"], language="de")
    build(text, tmp_path / "shards", BuildOptions(tokenizer=str(tmp_path / "more")), 1)
    values = {
        "model__llm": f"{{path: {tmp_path / 'more'}}}", "train__steps": 2, "data__block_tokens": 32,
        "data__train": f"[{{shards: {tmp_path / 'shards'}}}]", "data__eval": "[]",
    }  # fmt: skip
    run_job(STAGE, corpus.sets(STAGE, tmp_path / "run", 2, **values), 2)
    assert max(export(tmp_path / "run", tmp_path / "export", which="latest").values()) < 1e-4, "as the live model"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("more", "export"))
    table = "model.embed_tokens.weight"
    assert before[table].shape == after[table].shape
    for at in new.values():
        assert not torch.equal(before[table][at], after[table][at])
    prints = {tokenizer_fingerprint(load_tokenizer(LlmConfig(path=str(tmp_path / p)))) for p in ("more", "export")}
    assert len(prints) == 1, "the exported tokenizer is the new one"
