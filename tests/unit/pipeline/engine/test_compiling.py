"""Compiled layers compute what they compute otherwise; what cannot be compiled is refused with its reason."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.deepspeed import deepspeed_problems, ds_config
from pipeline.config.load import load_recipe
from pipeline.config.schema import Recipe
from pipeline.engine.compiling import compile_layers, compile_model
from pipeline.errors import RecipeError

CPU = torch.device("cpu")


def test_compiled_layers_give_the_same_losses_and_gradients() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    compiled = copy.deepcopy(plain)
    assert compile_layers(compiled, backend="eager") == 2
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for length in (5, 9):
        ids_BL = torch.randint(0, 37, (2, length))
        losses = [llm(ids_BL, labels=ids_BL, use_cache=False).loss for llm in (plain, compiled)]
        torch.testing.assert_close(losses[1], losses[0])
        for llm, loss in zip((plain, compiled), losses, strict=True):
            llm.zero_grad()
            loss.backward()
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_nothing_to_compile() -> None:
    with pytest.raises(RecipeError, match=r"train\.compile=layers: the model has no layers"):
        compile_layers(nn.Linear(2, 2))


def test_every_way() -> None:
    called: list[str] = []
    engine = SimpleNamespace(compile=lambda: called.append("compile"), module=nn.Linear(2, 2))
    compile_model(engine, "none", CPU)
    assert not called
    with pytest.raises(RecipeError, match="DeepSpeed's compiler needs a CUDA device, this is cpu"):
        compile_model(engine, "deepcompile", CPU)
    compile_model(engine, "deepcompile", torch.device("cuda"))
    assert called == ["compile"]
    with pytest.raises(RecipeError, match="no layers"):
        compile_model(engine, "layers", CPU)


def recipe(stage: str = "continued_pretraining", **train: Any) -> Recipe:
    loaded = load_recipe(f"demo_{stage}")
    return loaded.model_copy(update={"train": loaded.train.model_copy(update=train)})


def on_base(found: Recipe, base: str, **overrides: Any) -> Recipe:
    changes = {"base": base, "overrides": overrides}
    return found.model_copy(update={"deepspeed": found.deepspeed.model_copy(update=changes)})


def test_what_may_be_compiled() -> None:
    for base in ("zero1", "zero2"):
        assert not deepspeed_problems(on_base(recipe(compile="layers"), base))
    for base in ("zero1", "zero2", "zero3"):
        config = ds_config(on_base(recipe(compile="deepcompile"), base, compile={"double_buffer": False}), 1, 4)
        assert config["compile"] == {"double_buffer": False, "deepcompile": True}
    assert "compile" not in ds_config(recipe(), 1, 4)


def with_options(found: Recipe, **options: Any) -> Recipe:
    section = found.continued_pretraining.model_copy(update=options)
    return found.model_copy(update={"continued_pretraining": section})


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (on_base(recipe(compile="layers"), "zero3"), "layers: the hooks of ZeRO stage 3 would cut every layer"),
        (
            on_base(recipe(compile="layers"), "zero1").model_copy(
                update={"model": recipe().model.model_copy(update={"gradient_checkpointing": 0.5})}
            ),
            "set model.gradient_checkpointing=false",
        ),
        (on_base(recipe("contrastive", compile="deepcompile"), "zero1"), "shapes change from batch to batch"),
        (
            on_base(recipe(compile="deepcompile"), "zero1", zero_optimization={"stage": 0}),
            "DeepSpeed compiles under ZeRO stages 1 to 3, not 0",
        ),
        (on_base(recipe(compile="layers", sequence_parallel=2), "zero1"), "train.sequence_parallel must be 1"),
        (
            on_base(with_options(recipe(compile="deepcompile"), mlp_chunk_tokens=8), "zero1"),
            "continued_pretraining.mlp_chunk_tokens 0",
        ),
        (
            on_base(with_options(recipe(compile="deepcompile"), offload_activations=True), "zero1"),
            "continued_pretraining.offload_activations; set that to false",
        ),
        (on_base(recipe(compile="deepcompile"), "zero1", compile=True), "compile must be a section"),
        (on_base(recipe(), "zero1", compile={"deepcompile": True}), "decided by the recipe; set train.compile instead"),
    ],
)
def test_what_may_not(made: Recipe, problem: str) -> None:
    [found] = deepspeed_problems(made)
    assert problem in found.text and found.text.startswith("train.compile=") and "train.compile" in found.fields
