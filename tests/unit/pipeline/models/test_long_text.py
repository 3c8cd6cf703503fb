"""What makes room for long sequences changes no number: chunks of the MLP, and layer inputs in host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import RecipeError
from pipeline.models.attention import Spans, check_heads, implementation
from pipeline.models.chunked_mlp import chunk_mlps
from pipeline.models.offload import offload_layer_inputs
from tests.unit.pipeline.models.test_attention import documents, packed, tiny


def results(chunk_tokens: int = 0, recompute: bool = False, offload: bool = False) -> dict[str, torch.Tensor]:
    """Logits and gradients of packed documents in float64."""
    model = tiny("qwen3", torch.float64, implementation("sdpa")).train()
    if chunk_tokens:
        chunk_mlps(model, chunk_tokens)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if offload:
        offload_layer_inputs(model)
    ids_BL, kwargs = packed(documents())
    logits = model(ids_BL, **kwargs).logits
    logits.square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BL, **kwargs).logits, logits)
    grads: dict[str, Any] = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), **grads}


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_tokens": 5},
        {"chunk_tokens": 5, "recompute": True},
        {"recompute": True, "offload": True},
        {"chunk_tokens": 1, "recompute": True, "offload": True},
    ],
)
def test_logits_and_gradients_are_those_without(options: dict[str, Any]) -> None:
    plain, long = results(), results(**options)
    for name, value in plain.items():
        torch.testing.assert_close(long[name], value, rtol=1e-12, atol=1e-13, msg=name)


def test_no_more_positions_than_asked_for_go_through_an_mlp() -> None:
    model = tiny("llama", torch.float32, implementation("sdpa"))
    seen: list[tuple[int, ...]] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    chunk_mlps(model, 10)
    ids_BL, kwargs = packed(documents())
    model(ids_BL, **kwargs)
    assert seen == [(1, 10), (1, 10), (1, 10), (1, 2)] * 2
    seen.clear()
    model(ids_BL[:, :16].repeat(2, 1), position_ids=torch.arange(16).repeat(2, 1), **borders(2, 16))
    assert seen == [(2, 5), (2, 5), (2, 5), (2, 1)] * 2, "rows count too"
    seen.clear()
    model(ids_BL[:, :8], position_ids=torch.arange(8)[None], **borders(1, 8))
    assert seen == [(1, 8)] * 2


def borders(rows: int, length: int) -> dict[str, Any]:
    return {"documents": Spans.of([length] * rows), "use_cache": False}


def test_only_the_inputs_of_layers_are_kept_and_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, ...]] = []
    monkeypatch.setattr("pipeline.models.offload._to_host", lambda tensor: kept.append(tuple(tensor.shape)) or tensor)
    monkeypatch.setattr("pipeline.models.offload._from_host", lambda tensor: tensor)
    results(recompute=True, offload=True)
    assert kept == [(1, 32, 32)] * 2


def gpt2() -> PreTrainedModel:
    config = AutoConfig.for_model("gpt2", vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return AutoModelForCausalLM.from_config(config)


def test_a_model_without_such_parts_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"mlp_chunk_tokens=4: the layers of 'gpt2' have no part named mlp"):
        chunk_mlps(gpt2(), 4)
    bare = gpt2()
    bare.transformer.h = nn.ModuleList()
    with pytest.raises(RecipeError, match=r"offload_activations: 'gpt2' has no layers that transformers recomputes"):
        offload_layer_inputs(bare)


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    model = tiny("llama", torch.float32, implementation("sdpa"), num_key_value_heads=2)
    for size in (1, 2, 4):
        check_heads(model, size)
    with pytest.raises(RecipeError, match=r"4 attention heads and 2 key heads cannot be shared by .*=3 ranks"):
        check_heads(model, 3)
    model.config.num_key_value_heads = 3
    with pytest.raises(RecipeError, match=r"divides the key heads or is a multiple of them"):
        check_heads(model, 2)
