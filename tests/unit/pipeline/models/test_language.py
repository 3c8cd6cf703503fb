"""Tokenizers that cannot be used are refused with the setting that names them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.schema import LlmConfig, TextEncoderConfig
from pipeline.errors import RecipeError
from pipeline.models import language, text_encoder
from pipeline.models.exported import Export
from pipeline.models.language import load_llm, load_tokenizer
from pipeline.models.text_encoder import TextEncoder

SLOW = SimpleNamespace(eos_token_id=1, is_fast=False)


def slow_tokenizer(*args: object, **options: object) -> Any:
    return SLOW


def test_an_export_that_keeps_its_adapters_apart(tmp_path: Path) -> None:
    """Its weights alone are those from before it was trained."""
    (tmp_path / "llm_adapter").mkdir()
    message = r"keeps its adapters apart from the weights \(llm_adapter\).*export the run again with --lora merge"
    with pytest.raises(RecipeError, match=rf"model\.llm\.path: .*{message}"):
        load_llm(LlmConfig(path=str(tmp_path)), torch.float32)
    with pytest.raises(RecipeError, match=rf"model\.text_encoder\.path: .*{message}"):
        TextEncoder.from_config(TextEncoderConfig(kind="llm", path=str(tmp_path)))
    with pytest.raises(RecipeError, match=rf"model\.init_from: .*{message}"):
        Export(tmp_path)


def test_a_slow_tokenizer_of_the_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language.AutoTokenizer, "from_pretrained", slow_tokenizer)
    with pytest.raises(
        RecipeError, match=r"model\.llm\.tokenizer: 'old' is a slow tokenizer without character offsets"
    ):
        load_tokenizer(LlmConfig(path="old"))


def test_a_slow_tokenizer_of_the_text_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text_encoder.AutoModel, "from_pretrained", lambda *args, **options: None)
    monkeypatch.setattr(text_encoder.AutoTokenizer, "from_pretrained", slow_tokenizer)
    with pytest.raises(RecipeError, match=r"model\.text_encoder\.path: .* gives no character offsets.*tokenizer\.json"):
        TextEncoder.from_config(TextEncoderConfig(path=str(tmp_path)))
