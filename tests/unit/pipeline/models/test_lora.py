"""Adapters of any model: the numbers of PEFT, the layers they fit, and configs that rebuild them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import RecipeError
from pipeline.models import frame_level
from pipeline.models.lora import LoraLinear, adapted_layers, add_lora, described, linear_layers, matching


def vit() -> PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return AutoModel.from_config(AutoConfig.for_model("vit", image_size=32, patch_size=16, **sizes)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_names_first_weights_and_outputs_are_those_of_peft(dtype: torch.dtype) -> None:
    """Exports and checkpoints of earlier releases hold PEFT's layers, and their runs began with its numbers."""
    ours = vit().to(dtype)
    theirs = copy.deepcopy(ours)
    torch.manual_seed(5)
    frame_level.add_adapters(ours, 4, 8.0)
    torch.manual_seed(5)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", bias="none"), theirs)
    assert {n: p.requires_grad for n, p in ours.named_parameters() if "lora_" in n or p.requires_grad}
    left, right = ours.state_dict(), theirs.state_dict()
    assert list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)
    for model in (ours, theirs):
        torch.manual_seed(6)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    pixels = torch.rand(2, 3, 32, 32, dtype=dtype)
    assert torch.equal(ours(pixels).last_hidden_state, theirs(pixels).last_hidden_state)


def test_layers_that_adapters_fit() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=32, **sizes))
    names = linear_layers(llm)
    assert len(names) == 7 and "lm_head" not in names
    assert matching(names, ["q_proj", "mlp.*_proj"]) == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    ]  # fmt: skip
    assert matching(names, ["proj"]) == [] and matching(names, []) == names
    add_lora(llm, names[:1], 2, 4.0)
    assert linear_layers(llm) == [*names[1:], names[0]], "nothing inside an adapter"
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    assert linear_layers(attention) == ["out"], "it reads its weights without calling the layer"


def test_a_new_adapter_changes_nothing_and_counts_as_planned() -> None:
    layer = nn.Linear(3, 2)
    rows, adapted = torch.randn(4, 3), LoraLinear(layer, 2, 6.0)
    assert torch.equal(adapted(rows), layer(rows)) and adapted.weight is layer.weight
    nn.init.normal_(adapted.lora_B["default"].weight)
    update = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight * 3.0
    assert torch.allclose(adapted(rows), layer(rows) + rows @ update.T, atol=1e-6)
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    add_lora(model, ["a", "c"], 2, 4.0)
    add_lora(model, ["b"], 1, 4.0)
    groups = [{"rank": 2, "alpha": 4.0, "layers": ["a", "c"]}, {"rank": 1, "alpha": 4.0, "layers": ["b"]}]
    assert described(adapted_layers(model)) == groups


def test_a_backbone_without_such_layers() -> None:
    sizes = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    resnet = AutoModel.from_config(AutoConfig.for_model("resnet", **sizes))
    message = r"model\.visual\.backbone\.train=lora: the 'resnet' backbone has 0 linear layers; use train: full or"
    with pytest.raises(RecipeError, match=message):
        frame_level.add_adapters(resnet, 4, 8.0)
    message = r"has 13 linear layers, none of them \['c_attn'\]; use .* or other lora_targets"
    with pytest.raises(RecipeError, match=message):
        frame_level.add_adapters(vit(), 4, 8.0, ["c_attn"])
