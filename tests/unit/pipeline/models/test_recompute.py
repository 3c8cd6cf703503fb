"""Gradient checkpointing of a part of the layers: the same numbers, fewer recomputed layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.errors import RecipeError
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.recompute import checkpoint_gradients, layer_stacks
from pipeline.models.registry import build_llava_slt
from tests.unit.pipeline.models.tiny import bpe_tokenizer, data_config, model_config, shake


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlavaSltForConditionalGeneration, Any]:
    folder: Path = tmp_path_factory.mktemp("llava")
    bpe_tokenizer(folder)
    built = build_llava_slt(model_config(folder), data_config(), "signs: {video} sentence:", torch.float32)
    shake(built[0], 0.3)
    return built


def test_the_stacks_of_a_model_with_all_parts(llava: tuple[LlavaSltForConditionalGeneration, Any]) -> None:
    names = {id(part): name for name, part in llava[0].named_modules()}
    stacks = [[names[id(layer)] for layer in stack] for stack in layer_stacks(llava[0])]
    assert ["llm.model.layers.0", "llm.model.layers.1"] in stacks
    starts = [stack[0] for stack in stacks]
    assert "visual.word_level.frame_blocks.0" in starts and "visual.sentence_blocks.0" in starts
    assert any(start.startswith("visual.backbone.model.") for start in starts)


@pytest.mark.parametrize(("share", "recomputed"), [(0.0, 0), (0.3, 1), (0.5, 1), (0.75, 2), (True, 2)])
def test_a_share_of_the_layers_is_recomputed_and_no_number_changes(
    llava: tuple[LlavaSltForConditionalGeneration, Any], share: float, recomputed: int
) -> None:
    llm: Any = llava[0].llm
    llm.train()
    ids_BL = torch.arange(14).reshape(2, 7)
    runs: list[int] = []
    norms = [layer.input_layernorm for layer in llm.model.layers]
    for number, norm in enumerate(norms):
        norm.number = number
    hooks = [norm.register_forward_hook(lambda part, *_: runs.append(part.number)) for norm in norms]

    def gradients() -> list[torch.Tensor]:
        runs.clear()
        llm.zero_grad()
        llm(ids_BL, use_cache=False).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in llm.parameters()]

    checkpoint_gradients(llm, False)
    expected = gradients()
    assert runs == [0, 1]
    checkpoint_gradients(llm, share)
    assert all(torch.equal(*pair) for pair in zip(gradients(), expected, strict=True))
    assert sorted(runs) == sorted([0, 1, *range(recomputed)])
    for hook in hooks:
        hook.remove()
    checkpoint_gradients(llm, False)


def test_layers_that_cannot_be_chosen() -> None:
    model: Any = nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="own")
    with pytest.raises(RecipeError, match=r"model\.gradient_checkpointing=0\.5: 'own' recomputes all of its layers"):
        checkpoint_gradients(model, 0.5)


@pytest.mark.parametrize("value", [True, False, 0.25])
def test_the_recipe_takes_a_switch_or_a_share(value: bool | float) -> None:
    assert ModelConfig(gradient_checkpointing=value).gradient_checkpointing is value


@pytest.mark.parametrize("value", [1.5, -0.5, "half"])
def test_other_shares_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        ModelConfig(gradient_checkpointing=value)
