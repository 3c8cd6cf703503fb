"""Packed attention backends on a GPU against the per-document reference in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pipeline.models  # noqa: F401  (registers the keys)
from pipeline.errors import RecipeError
from pipeline.models.attention import _RUNNERS, BACKENDS, _Span, choose, implementation, packed_kwargs

pytestmark = pytest.mark.gpu

LENGTHS = (1, 7, 128, 129, 300)
FORWARD_ERROR, GRADIENT_ERROR = 1e-2, 2e-2
"""Relative errors allowed in bfloat16."""


def _usable(backend: str) -> None:
    try:
        choose(backend, "cuda", torch.bfloat16)
    except RecipeError as error:
        pytest.skip(str(error).splitlines()[0])


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(8, 8, 64), (8, 2, 128)])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 32), (False, None)])
def test_kernels(backend: str, heads: int, kv_heads: int, channels: int, causal: bool, window: int | None) -> None:
    _usable(backend)
    generator = torch.Generator("cuda").manual_seed(0)
    rows = sum(LENGTHS)
    shapes = [(rows, heads, channels), (rows, kv_heads, channels), (rows, kv_heads, channels)]
    exact = [torch.randn(shape, device="cuda", generator=generator).bfloat16().float() for shape in shapes]
    borders = torch.tensor((0, *LENGTHS), device="cuda").cumsum(0).to(torch.int32)
    span = _Span(borders, max(LENGTHS), channels**-0.5, causal, window)
    upstream = torch.randn(shapes[0], device="cuda", generator=generator)
    results = []
    for run, dtype in ((_RUNNERS["sdpa"], torch.float32), (_RUNNERS[backend], torch.bfloat16)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in exact]
        q, k, v = inputs
        output = run(q, k, v, span)
        grads = torch.autograd.grad(output, inputs, upstream.to(dtype))
        results.append((output.detach(), grads))
    (expected, expected_grads), (found, found_grads) = results
    assert found.shape == expected.shape and _error(found, expected) < FORWARD_ERROR
    for mine, reference in zip(found_grads, expected_grads, strict=True):
        assert _error(mine, reference) < GRADIENT_ERROR


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
    assert _error(logits.detach(), separate.detach()) < 2 * FORWARD_ERROR
    for (name, mine), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert _error(mine.grad, other.grad) < 4 * GRADIENT_ERROR, name


def test_auto_takes_a_fused_kernel() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0 or newer")
    assert choose("auto", "cuda", torch.bfloat16) != "sdpa"
    assert choose("auto", "cuda", torch.float32) == "sdpa"
