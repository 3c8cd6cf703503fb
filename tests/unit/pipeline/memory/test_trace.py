"""The meta device counts what the CPU really holds, and the stand-in what a fused attention keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import LlmConfig, TinyLlm
from pipeline.memory.activations import llm_bytes
from pipeline.memory.stand_in import KEY
from pipeline.memory.trace import peak_bytes
from pipeline.models.language import load_llm
from pipeline.models.recompute import checkpoint_gradients
from tests.unit.pipeline.models.tiny import bpe_tokenizer

TOKENS = 96


def test_a_storage_counts_while_something_refers_to_it() -> None:
    known = torch.zeros(10, device="meta")

    def run() -> None:
        first = known + 1  # 40 bytes
        second = (first * 2).view(2, 5)  # 40 more; a view is free
        del first
        _ = second[0].clone()  # 20 more, the first 40 are gone

    assert peak_bytes(run, [known]) == 80


def _llm(folder: Path, attention: str) -> Any:
    bpe_tokenizer(folder)
    sizes = TinyLlm(width=64, layers=3, heads=4, feed_forward=96, max_positions=128)
    return load_llm(LlmConfig(tiny=sizes, tokenizer=str(folder)), torch.float32, attention)


@pytest.mark.parametrize("recompute", [False, 0.5, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_traced_llm_takes_what_a_real_one_takes(recompute: float, frozen: bool, tmp_path: Path) -> None:
    """Within 3 %: the CPU's attention kernel pads its normalisers, and counts dropout's counters."""
    from transformers import AttentionInterface

    from pipeline.memory.stand_in import attend

    AttentionInterface.register(KEY, attend)
    with torch.device("meta"):
        traced = _llm(tmp_path, KEY).requires_grad_(not frozen)
    planned = llm_bytes(traced, TOKENS, recompute)
    assert planned == llm_bytes(traced, TOKENS, recompute)  # leaves nothing behind
    real = _llm(tmp_path, "sdpa").requires_grad_(not frozen)
    assert planned == pytest.approx(_measured(real, recompute), rel=0.03)


def test_options_for_long_text_are_counted(tmp_path: Path) -> None:
    """Of chunked MLPs one chunk is there at a time; the inputs that wait elsewhere are those of all layers but one."""
    from transformers import AttentionInterface

    from pipeline.memory.stand_in import attend
    from pipeline.models.chunked_mlp import chunk_mlps

    AttentionInterface.register(KEY, attend)
    with torch.device("meta"):
        plain, chunked = _llm(tmp_path, KEY), _llm(tmp_path, KEY)
    chunk_mlps(chunked, TOKENS // 4)
    assert llm_bytes(chunked, TOKENS, recompute=False) < 0.75 * llm_bytes(plain, TOKENS, recompute=False)
    whole = llm_bytes(plain, TOKENS, recompute=True)
    assert llm_bytes(chunked, TOKENS, recompute=True) < whole
    assert whole - llm_bytes(plain, TOKENS, recompute=True, offload=True) == 2 * TOKENS * 64 * 4


def _measured(llm: Any, recompute: float) -> int:
    checkpoint_gradients(llm, recompute)
    llm.train()
    embeds_BLE = torch.zeros(1, TOKENS, 64, requires_grad=True)

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in llm.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)

    def run() -> None:
        hidden_BLE = llm.get_decoder()(inputs_embeds=embeds_BLE, use_cache=False).last_hidden_state
        hidden_BLE.backward(torch.empty_like(hidden_BLE))

    return peak_bytes(run, [*llm.parameters(), *llm.buffers(), embeds_BLE], "cpu")
