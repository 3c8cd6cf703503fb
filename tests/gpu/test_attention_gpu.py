"""Packed attention backends on a GPU against the per-document reference in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pipeline.models  # noqa: F401  (registers the keys)
from benchmarks.gpu.attention import (
    CASES,
    FORWARD_ERROR,
    GRADIENT_ERROR,
    HEADS,
    LENGTHS,
    errors,
    obstacle,
    relative_error,
)
from pipeline.models.attention import BACKENDS, choose, implementation, packed_kwargs
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.registry import build_visual
from pipeline.models.visual import HierarchicalVisualEncoder, VisualOutput
from pipeline.stages.batches import to_device
from tests.unit.pipeline.models.tiny import PIXELS, shake, visual_config

pytestmark = pytest.mark.gpu
CLIPS = (1, 7, 64, 33, 16)


def _usable(backend: str) -> None:
    if reason := obstacle(backend, "cuda"):
        pytest.skip(reason)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_kernels(backend: str, heads: tuple[int, int, int], case: str) -> None:
    _usable(backend)
    forward, backward = errors(backend, "cuda", heads, case)
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
    own, key = copy.deepcopy(config), implementation(backend)  # transformers writes the key into the config it is given
    model = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16, attn_implementation=key)
    model.load_state_dict(reference.state_dict())
    model.cuda().train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parts = [torch.randint(0, 211, (length,), device="cuda") for length in LENGTHS]
    separate = torch.cat([reference(part[None]).logits[0] for part in parts])
    separate.float().square().mean().backward()
    documents = torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)])[None].cpu()
    logits = model(torch.cat(parts)[None], **to_device(packed_kwargs(documents), torch.device("cuda"))).logits[0]
    logits.float().square().mean().backward()
    assert relative_error(logits.detach(), separate.detach()) < 2 * FORWARD_ERROR
    for (name, mine), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert relative_error(mine.grad, other.grad) < 4 * GRADIENT_ERROR, name


def _encoder_step(encoder: HierarchicalVisualEncoder, features_NP: torch.Tensor, layout: ClipLayout) -> VisualOutput:
    encoder.zero_grad()
    output = encoder(features_NP, layout=layout)
    (output.words_MD.float().square().mean() + output.sentence_BD.float().square().mean()).backward()
    return output


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_encoder_equals_the_cpu(backend: str) -> None:
    """All levels in bfloat16 against float32, forward and backward, without one synchronisation."""
    _usable(backend)
    encoder = build_visual(visual_config(width=128), PIXELS, torch.bfloat16)
    shake(encoder)
    reference = copy.deepcopy(encoder).float()
    encoder.cuda().choose_attention(backend, "cuda")
    features_NP = torch.randn(sum(CLIPS), 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    layout = ClipLayout.of(CLIPS, encoder.config.clip_sizes())
    expected = _encoder_step(reference, features_NP.float(), layout)
    here = features_NP.cuda(), layout.to("cuda")
    _encoder_step(encoder, *here)  # compiles what is compiled at first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = _encoder_step(encoder, *here)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("frames_ND", "words_MD", "sentence_BD"):
        assert relative_error(found[name].detach().cpu(), expected[name].detach()) < 2 * FORWARD_ERROR, name
    for (name, mine), other in zip(encoder.named_parameters(), reference.parameters(), strict=True):
        if "word_level" in name and name.endswith("weight"):
            assert mine.grad is not None and other.grad is not None
            assert relative_error(mine.grad.cpu(), other.grad) < 4 * GRADIENT_ERROR, name


def test_auto_takes_a_fused_kernel() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0 or newer")
    assert choose("auto", "cuda", torch.bfloat16) != "sdpa"
    assert choose("auto", "cuda", torch.float32) == "sdpa"
