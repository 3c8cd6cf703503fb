"""The choice of fused kernels, and the kernels themselves in Triton's interpreter, against the model's own code."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.config.parts_schema import PartConfig
from pipeline.errors import RecipeError
from pipeline.losses import IGNORE_LABEL, ScaledHead, token_cross_entropy
from pipeline.models import kernels
from pipeline.models.parts import apply_parts
from tests.unit.pipeline.models.tiny import shake

SIZES: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | changes)))
    shake(llm, 0.3)
    return llm


# --- the choice


def test_torch_is_always_possible(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert kernels.choose("torch", tiny("gpt2"), "cpu") == ("torch", "torch")
    assert "none (the recipe's choice)" in caplog.text


@pytest.fixture
def without_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.cross_entropy", None)


class Kernel:
    """Stands for a compiled kernel, which needs a device."""

    liger_cross_entropy_kernel = object()


class Driver:
    """Stands for Triton's, which a machine without a device does not have."""

    active = object()


class NoCompiler:
    @property
    def active(self) -> object:
        raise RuntimeError("Failed to find C compiler.")


@pytest.fixture
def with_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.cross_entropy", Kernel)
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=Driver))


@pytest.mark.usefixtures("without_liger")
def test_liger_is_not_installed(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RecipeError, match=r"model\.kernels: liger cannot be used: liger-kernel cannot") as error:
        kernels.choose("liger", tiny("llama"), "cuda")
    assert "pip install 'llava-slt[gpu]'" in str(error.value) and "Use auto or torch" in str(error.value)
    with caplog.at_level(logging.INFO):
        assert kernels.choose("auto", tiny("llama"), "cuda") == ("torch", "torch")
    assert "layers torch, token loss torch (auto); liger-kernel cannot be imported" in caplog.text


@pytest.mark.usefixtures("with_liger")
def test_what_liger_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RecipeError, match="its kernels need a CUDA device, this is cpu"):
        kernels.choose("liger", tiny("llama"), "cpu")
    for llm, problem in (
        (tiny("gpt_neox"), "no fused layers are known for 'gpt_neox'"),
        (tiny("llama", hidden_act="gelu"), "feed-forward blocks use gelu, the fused ones of llama compute silu"),
    ):
        with pytest.raises(RecipeError, match=problem):
            kernels.choose("liger", llm, "cuda")
        with caplog.at_level(logging.INFO):
            assert kernels.choose("auto", llm, "cuda") == ("torch", "liger"), "the loss fits every family"
        assert problem in caplog.text


@pytest.mark.usefixtures("with_liger")
def test_liger_fits(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert kernels.choose("auto", tiny("qwen3"), "cuda") == ("liger", "liger")
        assert kernels.choose("liger", tiny("gemma2"), "cuda") == ("liger", "liger")
    assert "layers liger, token loss liger (auto)" in caplog.text and "(forced by the recipe)" in caplog.text


@pytest.mark.usefixtures("with_liger")
def test_triton_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=NoCompiler()))
    with pytest.raises(RecipeError, match=r"liger cannot be used: Triton cannot compile here \(Failed to find C"):
        kernels.choose("liger", tiny("llama"), "cuda")
    assert kernels.choose("auto", tiny("llama"), "cuda") == ("torch", "torch")


# --- the kernels, on the CPU


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """liger-kernel in Triton's interpreter, which lacks two things: it hands floats to kernels as they are, and knows
    no functions of the device's library."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    triton = pytest.importorskip("triton", reason="not installed: pip install --no-deps triton liger-kernel")
    pytest.importorskip("liger_kernel", reason="not installed: pip install --no-deps triton liger-kernel")
    if type(triton.language.cdiv).__name__ != "InterpretedFunction":
        pytest.skip("triton was imported without TRITON_INTERPRET=1, which make test sets")
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreting

    of_others = interpreting._implicit_cvt

    def convert(value: Any) -> Any:
        if not isinstance(value, float):
            return of_others(value)
        return tl.tensor(interpreting.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreting, "_implicit_cvt", convert)
        for module in ("cross_entropy", "geglu"):
            patch.setattr(f"liger_kernel.ops.{module}.tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
        patch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: 1 / tl.sqrt(x))
        yield


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_loss(bias: bool, scale: float, softcap: float | None) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 11, bias=bias)
    head = ScaledHead(linear, scale, softcap)
    hidden_ND, targets_N = torch.randn(9, 6, requires_grad=True), torch.tensor([1, 2, -100, 10, 0, 3, -100, 5, 5])
    leaves = [hidden_ND, *linear.parameters()]
    wanted, loss = (token_cross_entropy(hidden_ND, head, targets_N, 4, name) for name in ("torch", "liger"))
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    for grad, exact in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(token_cross_entropy(hidden_ND, head, targets_N, 4, "liger"), loss)
        nothing = torch.full((9,), IGNORE_LABEL)
        assert token_cross_entropy(hidden_ND, head, nothing, 4, "liger").item() == 0.0


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_fused_layers_of_a_family(family: str) -> None:
    plain = tiny(family)
    fused = copy.deepcopy(plain)
    modeling: Any = importlib.import_module(type(plain).__module__)
    before = dict(vars(modeling))
    assert kernels.choose("liger", fused, "cpu") == ("liger", "liger")
    kernels.fuse_layers(fused)
    changed = {name for name, value in vars(modeling).items() if before.get(name) is not value}
    assert changed <= {"apply_rotary_pos_emb"}, "models of the family that are made later keep their own classes"
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert type(fused) is type(plain) and fused.config.to_dict() == plain.config.to_dict()
    resolved = importlib.import_module("liger_kernel.backends").resolve_impl("rms_norm").impl_name
    assert resolved == "nvidia-triton"
    replaced = [name for name, part in fused.named_modules() if "forward" in vars(part)]
    assert len([name for name in replaced if name.endswith("mlp")]) == 2
    assert len([name for name in replaced if "norm" in name]) >= 5

    ids_BL = torch.randint(3, 37, (2, 7), generator=torch.Generator().manual_seed(1))
    results = []
    for llm in (plain, fused):
        logits_BLV = llm(ids_BL, use_cache=False).logits
        logits_BLV.square().mean().backward()
        results.append((logits_BLV, [p.grad for p in llm.parameters()]))
    modeling.apply_rotary_pos_emb = before["apply_rotary_pos_emb"]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    for (name, _), grad, wanted in zip(plain.named_parameters(), results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("interpreter")
def test_fused_layers_with_adapters() -> None:
    """Adapters come after the kernels, which find them in the place of the linear layers."""
    plain = tiny("llama")
    modeling: Any = importlib.import_module(type(plain).__module__)
    before = modeling.apply_rotary_pos_emb
    fused = copy.deepcopy(plain)
    kernels.fuse_layers(fused)
    ids_BL = torch.randint(3, 37, (2, 7), generator=torch.Generator().manual_seed(1))
    results = []
    for llm in (plain, fused):
        torch.manual_seed(2)  # of the adapters
        apply_parts(llm, {}, {"model": PartConfig(mode="lora", lora_rank=2), "lm_head": PartConfig(mode="frozen")})
        shake(llm, 0.3)
        logits_BLV = llm(ids_BL, use_cache=False).logits
        logits_BLV.square().mean().backward()
        results.append((logits_BLV, {n: p.grad for n, p in llm.named_parameters() if p.grad is not None}))
    modeling.apply_rotary_pos_emb = before
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    assert results[0][1].keys() == results[1][1].keys() and all(".lora_" in name for name in results[0][1])
    for name, wanted in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.usefixtures("interpreter")
def test_rotary_positions_look_at_the_device() -> None:
    rotary = kernels._RotaryPositions(lambda q: "own", lambda q: "fused", everywhere=False)
    assert rotary(torch.zeros(1)) == "own"
    assert kernels._RotaryPositions(lambda q: "own", lambda q: "fused", everywhere=True)(torch.zeros(1)) == "fused"
