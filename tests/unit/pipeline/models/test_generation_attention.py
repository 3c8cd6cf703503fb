"""The language model's attention in generation: a key that exists here, set and taken back in one place."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from pipeline.models.attention import implementation
from pipeline.models.generation_attention import generation_key, switched
from pipeline.models.language import load_llm
from tests.unit.pipeline.models.tiny import bpe_tokenizer, llm_config


@pytest.mark.parametrize(
    ("backend", "installed", "key", "said"),
    [
        ("sdpa", False, "sdpa", "attention in generation: sdpa"),
        ("torch_varlen", True, "sdpa", "sdpa; transformers has no key of its own for torch_varlen"),
        ("fa2", True, "flash_attention_2", "attention in generation: flash_attention_2"),
        ("fa4", True, "flash_attention_4", "attention in generation: flash_attention_4"),
        ("fa3", False, "sdpa", "sdpa; transformers does not find the library of fa3"),
    ],
)
def test_generation_uses_the_library_of_training_where_transformers_can(
    backend: str, installed: bool, key: str, said: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for entry in FLASH_ATTENTION_COMPATIBILITY_MATRIX.values():
        monkeypatch.setitem(entry, "general_availability_check", lambda: installed)
    with caplog.at_level(logging.INFO, "pipeline.models.generation_attention"):
        assert generation_key(backend) == key
    (record,) = caplog.records
    assert record.getMessage().endswith(said)


@torch.no_grad()
def test_a_model_of_packed_rows_generates_as_before_and_is_switched_back_also_after_an_error(tmp_path: Path) -> None:
    bpe_tokenizer(tmp_path)
    torch.manual_seed(0)
    model = load_llm(llm_config(tmp_path), torch.float32, implementation("sdpa")).eval()
    plain = load_llm(llm_config(tmp_path), torch.float32).eval()
    plain.load_state_dict(model.state_dict())
    prompts = {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    }
    with switched(model, "sdpa"):
        new = model.generate(**prompts, max_new_tokens=5, num_beams=2, pad_token_id=0)
        assert torch.equal(new, plain.generate(**prompts, max_new_tokens=5, num_beams=2, pad_token_id=0))
    assert model.config._attn_implementation == implementation("sdpa")
    with pytest.raises(ZeroDivisionError), switched(model, "sdpa"):
        assert model.config._attn_implementation == "sdpa"
        raise ZeroDivisionError
    assert model.config._attn_implementation == implementation("sdpa")
    with pytest.raises(ValueError, match="packed attention got an attention_mask"):
        model(**prompts)
