"""Packed attention: equal to separate documents, and never silently anything else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import pipeline.models  # noqa: F401  (registers the keys)
from pipeline.config.schema import LlmConfig
from pipeline.errors import RecipeError
from pipeline.models.attention import (
    BACKENDS,
    Reach,
    Spans,
    check_model,
    choose,
    choose_for,
    choosing,
    implementation,
    packed_kwargs,
    refuse_masks,
)
from pipeline.models.language import load_llm

DOCUMENTS = (1, 7, 12, 3, 9)
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(kind: str, dtype: torch.dtype, attention: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    extra = {"head_dim": 8} if kind == "qwen3" else {}
    config = AutoConfig.for_model(kind, **{**SIZES, "num_key_value_heads": 2, **extra, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 61, (length,), generator=generator) for length in DOCUMENTS]


def packed(parts: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    ids = torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)])[None]
    return torch.cat(parts)[None], packed_kwargs(ids)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_packed_logits_and_gradients_equal_those_of_separate_documents(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    changes = {"sliding_window": 4} if kind == "mistral" else {}
    reference = tiny(kind, dtype, "sdpa", **changes).train()
    ours = tiny(kind, dtype, implementation("sdpa"), **changes).train()
    parts = documents()
    separate = torch.cat([reference(part[None], use_cache=False).logits[0] for part in parts])
    separate.square().sum().backward()
    ids_BL, kwargs = packed(parts)
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ours.zero_grad()
        logits = ours(ids_BL, **kwargs).logits[0]
        torch.testing.assert_close(logits, separate, atol=tolerance, rtol=tolerance)
        logits.square().sum().backward()
        for (name, mine), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, atol=100 * tolerance, rtol=100 * tolerance, msg=name)


def test_rows_of_a_batch_are_separate_too() -> None:
    model = tiny("llama", torch.float64, implementation("sdpa")).eval()
    first, second = documents()[1], documents()[4]
    rows = torch.stack((torch.cat((first, second)), torch.cat((second, first))))
    ids = torch.tensor([[0] * 7 + [1] * 9, [1] * 9 + [0] * 7])
    logits = model(rows, **packed_kwargs(ids)).logits
    torch.testing.assert_close(logits[0, :7], logits[1, 9:], atol=1e-12, rtol=0)
    torch.testing.assert_close(logits[0, 7:], logits[1, :9], atol=1e-12, rtol=0)


def test_packed_kwargs() -> None:
    kwargs = packed_kwargs(torch.tensor([[4, 4, 9, 9, 9], [9, -1, -1, -1, -1]]))
    assert kwargs["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert kwargs["documents"].borders.tolist() == [0, 2, 5, 6, 10] and kwargs["documents"].borders.dtype == torch.int32
    assert kwargs["documents"].longest == 4 and kwargs["use_cache"] is False


def test_calls_that_would_be_wrong_fail() -> None:
    model = tiny("llama", torch.float32, implementation("sdpa")).eval()
    ids_BL, kwargs = packed(documents())
    for _ in range(2):
        refuse_masks(model)
    assert len(model.model._forward_pre_hooks) == 1
    with pytest.raises(ValueError, match="packed attention got an attention_mask"):
        model(ids_BL, attention_mask=torch.ones_like(ids_BL), **kwargs)
    with pytest.raises(ValueError, match="packed attention needs the documents"):
        model(ids_BL)
    model.set_attn_implementation("sdpa")
    assert model.generate(ids_BL[:, :5], max_new_tokens=2, pad_token_id=0).shape == (1, 7)


def test_models_that_packed_attention_cannot_compute() -> None:
    ids_BL, kwargs = packed(documents())
    with pytest.raises(RecipeError, match="attention soft-capping"):
        tiny("gemma2", torch.float32, implementation("sdpa"), head_dim=8)(ids_BL, **kwargs)
    capped = tiny("gemma2", torch.float32, "eager", head_dim=8)
    sunk = tiny("gpt_oss", torch.float32, "eager", head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    for model, what in ((capped, "attention soft-capping"), (sunk, "attention sinks")):
        with pytest.raises(RecipeError, match=f"uses {what}, which no packed attention backend here computes"):
            check_model(model)
    with pytest.raises(RecipeError, match=r"attention_dropout 0.1 is not supported"):
        tiny("llama", torch.float32, implementation("sdpa"), attention_dropout=0.1).train()(ids_BL, **kwargs)


def test_choice_on_the_cpu_is_logged_with_reasons(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline.models.attention"):
        assert choose("auto", "cpu") == "sdpa" == choose("sdpa", "cpu")
    assert (
        "attention of packed documents: sdpa (auto); not fa4, fa3, fa2, torch_varlen: needs a CUDA device"
        in caplog.text
    )
    assert "forced by the recipe" in caplog.text


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "sdpa"])
def test_forced_and_missing_is_an_error(backend: str) -> None:
    with pytest.raises(
        RecipeError, match=f"{backend} cannot run packed documents on this machine: needs a CUDA device, not cpu"
    ):
        choose(backend, "cpu")


def test_causal_cross_attention_is_refused() -> None:
    one, other = Spans.of([2, 3]), Spans.of([1, 1])
    with pytest.raises(ValueError, match="need queries and keys with the same borders"):
        Reach(other, one, causal=True)


def test_unknown_backend() -> None:
    with pytest.raises(RecipeError, match="'flash' is not one of auto, fa4"):
        choose("flash", "cpu")


def test_reasons_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an Ampere device and no flash-attn takes what torch ships."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose("auto", "cuda", torch.bfloat16) == "torch_varlen"
    assert choose("auto", "cuda", torch.float32) == "sdpa"
    with pytest.raises(RecipeError, match=r"needs compute capability 9.0 or newer, not 8.0"):
        choose("fa3", "cuda")
    with pytest.raises(RecipeError, match="needs bfloat16 or float16"):
        choose("torch_varlen", "cuda", torch.float32)
    with pytest.raises(RecipeError, match="No module named 'flash_attn'"):
        choose("fa2", "cuda")


def test_channels_that_a_kernel_does_not_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with caplog.at_level(logging.INFO):
        assert choose("auto", "cuda", head_dim=20, part="the words") == "sdpa"
    assert "attention of the words: sdpa (auto); not fa4, fa3, fa2, torch_varlen: takes multiples of 8" in caplog.text
    assert "up to 256 channels per head, not 20" in caplog.text
    assert choose("torch_varlen", "cuda", head_dim=256) == "torch_varlen"
    with pytest.raises(
        RecipeError, match=r"torch_varlen cannot run the words .*: takes multiples of 8 up to 256 .* 264"
    ):
        choose("torch_varlen", "cuda", head_dim=264, part="the words")


def test_the_choice_for_a_model_knows_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", torch.bfloat16, implementation("sdpa"), hidden_size=48)
    assert choose_for(model, "auto", "cpu") == "sdpa" and model.config._attn_implementation == implementation("sdpa")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_for(model, "auto", "cuda") == "sdpa"
    with pytest.raises(RecipeError, match="takes multiples of 8 up to 256 channels per head, not 12"):
        choose_for(model, "torch_varlen", "cuda")
    other = tiny("qwen3", torch.bfloat16, implementation("sdpa"))  # its config names the channels
    assert choose_for(other, "auto", "cuda") == "torch_varlen"
    assert other.config._attn_implementation == implementation("torch_varlen")


def test_devices_that_a_kernel_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(choosing, "kernel", lambda backend: None)
    assert choose("auto", "cuda", head_dim=128) == choose("auto", "cuda", head_dim=256) == "fa4"
    assert choose("auto", "cuda", head_dim=192) == "fa2"
    with pytest.raises(RecipeError, match=r"fa4 .* takes up to 128 channels per head here, or 256, not 192"):
        choose("fa4", "cuda", head_dim=192)
    with pytest.raises(RecipeError, match=r"fa3 .* has no kernels for compute capability 10.0, only up to 9.x"):
        choose("fa3", "cuda")


def test_the_key_does_not_pass_for_flash_attention() -> None:
    for word in ("flash", "flex_attention", "sdpa"):  # transformers would apply its own rules for these
        assert all(word not in implementation(backend) for backend in BACKENDS)


def test_models_that_would_ignore_the_document_borders(tmp_path: Path) -> None:
    def save(kind: str, **changes: Any) -> LlmConfig:
        tiny(kind, torch.float32, "eager", **changes).save_pretrained(tmp_path / kind)
        return LlmConfig(path=str(tmp_path / kind))

    with pytest.raises(RecipeError, match="does not take its attention from outside"):
        load_llm(save("bloom", n_layer=1, n_head=2), torch.float32, implementation("sdpa"))
    chunked = save("llama", layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(RecipeError, match="chunked_attention layers"):
        load_llm(chunked, torch.float32, implementation("sdpa"))
    assert load_llm(chunked, torch.float32) is not None
