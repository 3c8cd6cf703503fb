"""Adapters of an export: added to their layers, or alone in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.export.entry import Entry
from pipeline.export.lora import Adapters, Base, bases_of, check_kept, config_without_adapters

PLAN: dict[str, object] = {"prefix": ""}
CONFIG = {"model_type": "slt_visual", "lora_rank": 2, "lora_alpha": 8.0, "backbone_train": "lora"}


def entries(prefix: str, dtype: torch.dtype = torch.float32) -> list[Entry]:
    layer = f"{prefix}backbone.model.layer.0.dense"
    given = {
        f"{layer}.base_layer.weight": torch.randn(4, 3), f"{layer}.base_layer.bias": torch.ones(4),
        f"{layer}.lora_A.default.weight": torch.randn(2, 3), f"{layer}.lora_B.default.weight": torch.randn(4, 2),
        f"{prefix}norm.weight": torch.ones(3),
    }  # fmt: skip
    return [Entry(name, tuple(value.shape), dtype, lambda value=value: value) for name, value in given.items()]


@pytest.mark.parametrize("prefix", ["", "visual."])
def test_adapters_are_added_when_a_layer_is_written(prefix: str) -> None:
    given = entries(prefix)
    base, down, up = (given[at].read() for at in (0, 2, 3))
    before = base.clone()
    config = CONFIG if not prefix else {"model_type": "llava_slt", "visual_config": CONFIG, "lora_rank": 9}
    merged = {entry.name: entry for entry in Adapters.of(given, config, PLAN, []).merge(given)}
    layer = f"{prefix}backbone.model.layer.0.dense"
    assert list(merged) == [f"{layer}.weight", f"{layer}.bias", f"{prefix}norm.weight"]
    assert torch.allclose(merged[f"{layer}.weight"].read(), base + 4.0 * up @ down)
    assert torch.equal(base, before), "mapped files are not written to"
    changed = config_without_adapters(config)
    encoder = changed["visual_config"] if prefix else changed
    assert encoder == {**CONFIG, "lora_rank": 0, "backbone_train": "frozen"} and CONFIG["lora_rank"] == 2


def test_sums_start_from_the_weight_that_the_live_model_holds() -> None:
    given = entries("", torch.bfloat16)
    base, down, up = (given[at].read() for at in (0, 2, 3))
    weight = Adapters.of(given, CONFIG, PLAN, []).merge(given)[0]
    assert weight.dtype == torch.bfloat16
    assert torch.allclose(weight.read(), base.bfloat16().float() + 4.0 * up @ down)


def test_a_model_without_adapters() -> None:
    plain = [Entry("w", (1,), torch.float32, lambda: torch.zeros(1))]
    adapters = Adapters.of(plain, {"model_type": "llama"}, PLAN, [Base("llm_adapter", "", "base")])
    assert adapters.files() == [] and adapters.merge(plain) == plain
    with pytest.raises(CheckpointError, match="the model has no LoRA adapters to keep; leave out --lora keep"):
        check_kept(adapters)


def test_adapters_alone_name_their_base(tmp_path: Path) -> None:
    adapters = Adapters.of(entries(""), CONFIG, PLAN, [backbone("facebook/dinov2-small")])
    (file,) = adapters.files()
    assert file.name == "backbone_adapter/adapter_model.safetensors"
    prefix = "base_model.model.layer.0.dense"
    assert [entry.name for entry in file.entries] == [f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"]
    adapters.write_configs(tmp_path)
    config = json.loads((tmp_path / "backbone_adapter" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA", "base_model_name_or_path": "facebook/dinov2-small", "r": 2, "lora_alpha": 8.0,
        "target_modules": ["layer.0.dense"], "bias": "none", "inference_mode": True,
    }  # fmt: skip


def test_a_base_that_no_folder_holds_is_not_named(tmp_path: Path) -> None:
    adapters = Adapters.of(entries(""), CONFIG, PLAN, [backbone(None)])
    adapters.write_configs(tmp_path)
    assert adapters.files() == [] and not list(tmp_path.iterdir())


def backbone(path: str | None) -> Base:
    return Base("backbone_adapter", "backbone.model.", path)


def test_the_plan_of_the_run_says_how_strong_each_adapter_is(tmp_path: Path) -> None:
    """Layers of one base may differ; the config of a plain language model says nothing of them."""
    plan = {
        "prefix": "llm.",
        "adapters": [
            {"rank": 2, "alpha": 6.0, "layers": ["llm.model.q"]}, {"rank": 1, "alpha": 4.0, "layers": ["llm.model.v"]}
        ],
    }  # fmt: skip
    given = []
    for layer, rank in (("model.q", 2), ("model.v", 1)):
        named = {
            f"{layer}.base_layer.weight": torch.zeros(4, 3), f"{layer}.lora_A.default.weight": torch.ones(rank, 3),
            f"{layer}.lora_B.default.weight": torch.ones(4, rank),
        }  # fmt: skip
        given += [Entry(name, tuple(v.shape), v.dtype, lambda v=v: v) for name, v in named.items()]
    adapters = Adapters.of(given, {"model_type": "llama"}, plan, [Base("llm_adapter", "", "gpt")])
    merged = {entry.name: entry.read() for entry in adapters.merge(given)}
    assert torch.equal(merged["model.q.weight"], torch.full((4, 3), 6.0)), "3 x 2 of them"
    assert torch.equal(merged["model.v.weight"], torch.full((4, 3), 4.0))
    assert [entry.name for entry in adapters.without(given)] == ["model.q.weight", "model.v.weight"]
    adapters.write_configs(tmp_path)
    config = json.loads((tmp_path / "llm_adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6.0) and config["target_modules"] == ["model.q", "model.v"]
    assert config["rank_pattern"] == {r"^model\.v$": 1} and config["alpha_pattern"] == {r"^model\.v$": 4.0}


def test_bases_by_stage() -> None:
    model = ModelConfig.model_validate({"llm": {"path": "lm"}, "visual": {"backbone": {"path": "vit"}}})
    named = {prefix: bases_of(model, {"prefix": prefix}) for prefix in ("llm.", "visual.", "")}
    assert named["llm."] == [Base("llm_adapter", "", "lm")]
    assert named["visual."] == [Base("backbone_adapter", "backbone.model.", "vit")]
    assert [base.prefix for base in named[""]] == ["visual.backbone.model.", "llm."]
    assert [base.path for base in bases_of(ModelConfig(), {"prefix": ""})] == [None, None]


def test_the_base_is_what_the_run_started_with() -> None:
    parts = {"llm": {"path": "lm"}, "visual": {"backbone": {"path": "vit"}}}

    def paths(prefix: str, **init_from: str) -> list[str | None]:
        model = ModelConfig.model_validate(parts | {"init_from": init_from})
        return [base.path for base in bases_of(model, {"prefix": prefix})]

    assert paths("llm.", llm="later") == paths("llm.", model="later") == ["later"]
    assert paths("visual.", visual="encoder") == [None], "the backbone in an encoder is no model of its own"
    assert paths("", llm="later") == ["vit", "later"] and paths("", model="whole") == [None, None]
