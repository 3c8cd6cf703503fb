"""Fused kernels on a device: the token loss in bf16, and the layers of a family, against fp32 without them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.losses import Backend, token_cross_entropy

pytestmark = pytest.mark.gpu

ROWS, WIDTH, VOCABULARY = 700, 256, 5003


def _error(ours: Tensor, exact: Tensor) -> float:
    """Relative."""
    return float((ours.double().cpu() - exact.double().cpu()).norm() / exact.double().cpu().norm())


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_the_token_loss_in_bf16(backend: Backend) -> None:
    if backend == "liger":
        pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    hidden_ND, targets_N = torch.randn(ROWS, WIDTH), torch.randint(0, VOCABULARY, (ROWS,))
    targets_N[::7] = -100
    head = nn.Linear(WIDTH, VOCABULARY)
    results = []
    for device, dtype, kind in (("cpu", torch.float32, "torch"), ("cuda", torch.bfloat16, backend)):
        states_ND = hidden_ND.to(device, dtype).requires_grad_()
        here = copy.deepcopy(head).to(device, dtype)
        torch.cuda.set_sync_debug_mode("error")
        try:
            targets = targets_N.pin_memory().to(device, non_blocking=True)
            loss = token_cross_entropy(states_ND, here, targets, 128, kind)  # type: ignore[arg-type]
            grads = torch.autograd.grad(loss, [states_ND, *here.parameters()])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((loss, grads))
    assert _error(results[1][0], results[0][0]) < 2e-3
    for ours, exact in zip(results[1][1], results[0][1], strict=True):
        assert _error(ours, exact) < 2e-2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_fused_layers(family: str) -> None:
    pytest.importorskip("liger_kernel")
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipeline.models import kernels

    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).cuda()
    fused = copy.deepcopy(plain)
    assert kernels.choose("liger", fused, "cuda") == ("liger", "liger")
    kernels.fuse_layers(fused)
    ids_BL = torch.randint(3, 97, (2, 33), device="cuda")
    for llm in (plain, fused):
        llm(ids_BL, labels=ids_BL, use_cache=False).loss.backward()
    for ours, exact in zip(fused.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and exact.grad is not None
        assert _error(ours.grad, exact.grad) < 1e-3
