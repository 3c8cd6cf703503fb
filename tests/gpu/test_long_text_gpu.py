"""What long text waits for in host memory, on a GPU: the same gradients, less memory on the device, no wait."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pipeline.models  # noqa: F401  (registers the keys)
from benchmarks.gpu.attention import relative_error
from pipeline.models.attention import choose, implementation, packed_kwargs
from pipeline.models.chunked_mlp import chunk_mlps
from pipeline.models.offload import offload_layer_inputs
from pipeline.stages.batches import to_device

pytestmark = pytest.mark.gpu

LENGTH, WIDTH, LAYERS = 8192, 256, 8


def _gradients(chunk_tokens: int, offload: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a checkpointed model over one pack, and the most bytes it took; no call waits for the device."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 211, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    config = AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2, **sizes)
    key = implementation(choose("auto", "cuda", torch.bfloat16))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=key).cuda().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if chunk_tokens:
        chunk_mlps(model, chunk_tokens)
    if offload:
        offload_layer_inputs(model)
    ids_BL = torch.randint(0, 211, (1, LENGTH), device="cuda")
    kwargs = to_device(packed_kwargs(torch.arange(LENGTH)[None] // 1000), torch.device("cuda"))
    model.model(ids_BL, **kwargs).last_hidden_state.float().square().mean().backward()  # kernels and pinned memory
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.model(ids_BL, **kwargs).last_hidden_state.float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    grads = {name: parameter.grad for name, parameter in model.model.named_parameters()}
    return grads, torch.cuda.max_memory_allocated() - before


def _check_close(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    for name, grad in plain.items():
        assert relative_error(ours[name], grad) < 2e-2, name  # kernels add up in any order


def test_inputs_of_layers_in_host_memory() -> None:
    plain, most = _gradients(0, offload=False)
    apart, least = _gradients(0, offload=True)
    _check_close(apart, plain)
    assert most - least > (LAYERS - 2) * LENGTH * WIDTH * 2, "all inputs but those of the layers at work"


def test_mlps_in_chunks() -> None:
    plain, most = _gradients(0, offload=False)
    chunked, least = _gradients(1024, offload=True)
    _check_close(chunked, plain)
    assert least < 0.8 * most
