"""Packed attention backends on a GPU against the per-document reference in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pipeline.models  # noqa: F401  (registers the keys)
from benchmarks.gpu.attention import (
    FORWARD_ERROR,
    GRADIENT_ERROR,
    HEADS,
    LENGTHS,
    REACH,
    errors,
    obstacle,
    relative_error,
)
from pipeline.models.attention import BACKENDS, choose, implementation, packed_kwargs

pytestmark = pytest.mark.gpu


def _usable(backend: str) -> None:
    if reason := obstacle(backend, "cuda"):
        pytest.skip(reason)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("causal", "window"), REACH)
def test_kernels(backend: str, heads: tuple[int, int, int], causal: bool, window: int | None) -> None:
    _usable(backend)
    forward, backward = errors(backend, "cuda", heads, causal, window)
    assert forward < FORWARD_ERROR and backward < GRADIENT_ERROR


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packed_model_equals_separate_documents(backend: str, kind: str) -> None:
    """With gradient checkpointing, in bfloat16; the reference runs each document alone in float32."""
    _usable(backend)
    sizes = {"vocab_size": 211, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = AutoConfig.for_model(kind, **sizes, **heads)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=implementation(backend))
    model.load_state_dict(reference.state_dict())
    model.cuda().train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parts = [torch.randint(0, 211, (length,), device="cuda") for length in LENGTHS]
    separate = torch.cat([reference(part[None]).logits[0] for part in parts])
    separate.float().square().mean().backward()
    documents = torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)])[None].cpu()
    kwargs: dict[str, Any] = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in packed_kwargs(documents).items()
    }
    logits = model(torch.cat(parts)[None], **kwargs).logits[0]
    logits.float().square().mean().backward()
    assert relative_error(logits.detach(), separate.detach()) < 2 * FORWARD_ERROR
    for (name, mine), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert relative_error(mine.grad, other.grad) < 4 * GRADIENT_ERROR, name


def test_auto_takes_a_fused_kernel() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0 or newer")
    assert choose("auto", "cuda", torch.bfloat16) != "sdpa"
    assert choose("auto", "cuda", torch.float32) == "sdpa"
