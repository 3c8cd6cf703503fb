"""The language model's attention in generation: a key that exists here, set and taken back in one place."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from pipeline.models.attention import choosing, implementation
from pipeline.models.generation_attention import choose_for_generation, generation_key, switched
from pipeline.models.language import load_llm
from tests.unit.pipeline.models.tiny import bpe_tokenizer, llm_config


@pytest.fixture
def llm(tmp_path: Path) -> PreTrainedModel:
    bpe_tokenizer(tmp_path)
    return load_llm(llm_config(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("backend", "installed", "key", "said"),
    [
        ("sdpa", False, "sdpa", "attention in generation: sdpa"),
        ("torch_varlen", True, "sdpa", "sdpa; transformers has no key of its own for torch_varlen"),
        ("fa2", True, "flash_attention_2", "attention in generation: flash_attention_2"),
        ("fa4", True, "flash_attention_4", "attention in generation: flash_attention_4"),
        ("fa3", False, "sdpa", "sdpa; transformers does not find the library of fa3"),
        ("fa2 without support", True, "sdpa", "sdpa; llama does not take fa2 from transformers"),
    ],
)
def test_generation_uses_the_library_of_training_where_transformers_can(
    backend: str, installed: bool, key: str, said: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, llm: PreTrainedModel,
) -> None:  # fmt: skip
    for entry in FLASH_ATTENTION_COMPATIBILITY_MATRIX.values():
        monkeypatch.setitem(entry, "general_availability_check", lambda: installed)
    backend, _, missing = backend.partition(" ")
    monkeypatch.setattr(llm, "_supports_flash_attn", not missing)
    with caplog.at_level(logging.INFO, "pipeline.models.generation_attention"):
        assert generation_key(llm, backend) == key
    (record,) = caplog.records
    assert record.getMessage().endswith(said)


def test_a_model_that_only_generates_takes_what_this_device_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bpe_tokenizer(tmp_path)
    llm, keys = load_llm(llm_config(tmp_path), torch.bfloat16), []
    monkeypatch.setattr(llm, "set_attn_implementation", keys.append)
    choose_for_generation(llm, "cpu")
    assert keys == [] and llm.config._attn_implementation == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    choose_for_generation(llm, "cuda")  # only what torch ships
    monkeypatch.setattr(choosing, "kernel", lambda backend: None)
    for entry in FLASH_ATTENTION_COMPATIBILITY_MATRIX.values():
        monkeypatch.setitem(entry, "general_availability_check", lambda: True)
    choose_for_generation(llm, "cuda")
    monkeypatch.setattr(type(llm), "_supports_flash_attn", False)
    choose_for_generation(llm, "cuda")
    assert keys == ["flash_attention_2"]


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
    with pytest.raises(ValueError, match="packed attention needs the documents"):
        model(**prompts)
