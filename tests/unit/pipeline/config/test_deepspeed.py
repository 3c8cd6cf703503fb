from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import deepspeed as module
from pipeline.config.deepspeed import DS_CONFIGS, ds_config
from pipeline.config.load import load_recipe
from pipeline.config.schema import Recipe
from pipeline.errors import RecipeError
from tests.unit.pipeline.config.recipes import CONNECTOR, PRETRAINING, write


def config(folder: Path, *sets: str, text: str = PRETRAINING, world_size: int = 2) -> dict[str, Any]:
    recipe = load_recipe(write(folder, text), list(sets))
    return ds_config(recipe, world_size, recipe.train.global_batch // (recipe.train.micro_batch * world_size))


def with_base(folder: Path, content: object) -> Recipe:
    """A recipe, not checked yet, whose base holds this content."""
    path = folder / "base.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    recipe = load_recipe(write(folder, PRETRAINING))
    return recipe.model_copy(update={"deepspeed": recipe.deepspeed.model_copy(update={"base": str(path)})})


@pytest.mark.parametrize("base", sorted(path.stem for path in DS_CONFIGS.glob("*.json")))
def test_bases_become_explicit(tmp_path: Path, base: str) -> None:
    result = config(tmp_path, f"deepspeed.base={base}")
    assert "auto" not in json.dumps(result)
    assert result["train_batch_size"] == 8 and result["gradient_accumulation_steps"] == 2
    assert result["train_micro_batch_size_per_gpu"] == 2 and result["gradient_clipping"] == 1.0
    assert result["bf16"] == {"enabled": False} and "fp16" not in result
    assert result["zero_allow_untested_optimizer"] is True and "optimizer" not in result
    assert result["steps_per_print"] >= 10**9 and result["wall_clock_breakdown"] is False
    assert ("zero_force_ds_cpu_optimizer" in result) == (base == "zero3_offload")


def test_auto_sizes_follow_the_width(tmp_path: Path) -> None:
    zero = config(tmp_path, "deepspeed.base=zero3")["zero_optimization"]
    assert zero["reduce_bucket_size"] == 64 * 64 and zero["stage3_param_persistence_threshold"] == 640
    assert zero["stage3_prefetch_bucket_size"] == 3686
    zero = config(tmp_path, "deepspeed.base=zero3", "deepspeed.bucket_width=100")["zero_optimization"]
    assert zero["reduce_bucket_size"] == 10_000
    zero = config(tmp_path, "deepspeed.base=zero3", text=CONNECTOR)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 4096 * 4096  # no config of its models is here
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text('{"hidden_size": 1536}')
    sets = ["deepspeed.base=zero3", f"model.llm.path={tmp_path / 'llm'}"]
    assert config(tmp_path, *sets, text=CONNECTOR)["zero_optimization"]["reduce_bucket_size"] == 1536 * 1536


def test_overrides_are_merged(tmp_path: Path) -> None:
    sets = [
        "deepspeed.overrides={zero_optimization: {stage: 2}, steps_per_print: 5, bf16: {immediate_grad_update: false}}"
    ]
    result = config(tmp_path, *sets, "train.precision=bf16")
    assert result["zero_optimization"]["stage"] == 2 and "reduce_bucket_size" in result["zero_optimization"]
    assert result["steps_per_print"] == 5 and result["bf16"] == {"immediate_grad_update": False, "enabled": True}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_overflow_check_stays_on(tmp_path: Path, stage: int) -> None:
    """Stage 3 looks at every gradient anyhow."""
    overrides = "deepspeed.overrides={zero_optimization: {stage: %d}, bf16: {check_grad_overflow: false}}"
    with pytest.raises(RecipeError, match=f"check_grad_overflow=false under ZeRO stage {stage} would put non-finite"):
        config(tmp_path, overrides % stage)
    assert config(tmp_path, overrides % 3)["bf16"]["check_grad_overflow"] is False


ZERO = {"zero_optimization": {"stage": 3}}


def test_a_byte_order_mark_in_front_of_a_base(tmp_path: Path) -> None:
    recipe = with_base(tmp_path, "\ufeff" + (DS_CONFIGS / "cpu.json").read_text())
    assert ds_config(recipe, 1, 4) == config(tmp_path, world_size=1)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({**ZERO, "train_batch_size": 8}, "train_batch_size is decided by the recipe; set train.global_batch instead"),
        ({**ZERO, "optimizer": {"type": "AdamW"}}, "optimizer is decided by the recipe; set train.optimizer instead"),
        ({**ZERO, "fp16": {"enabled": True}}, "fp16 is decided by the recipe; set train.precision instead"),
        ({**ZERO, "bf16": {"enabled": True}}, "bf16.enabled is decided by the recipe; set train.precision instead"),
        ({**ZERO, "bf16": {"enable": True}}, "bf16.enable is not a DeepSpeed key; did you mean enabled?"),
        ({**ZERO, "gradient_cliping": 1}, "gradient_cliping is not a DeepSpeed key; did you mean gradient_clipping?"),
        ({**ZERO, "elasticity": {}}, "elasticity cannot be set: DeepSpeed has removed it"),
        ({**ZERO, "tensor_parallel": {}}, "tensor_parallel cannot be set: tensor parallelism is not part"),
        ({**ZERO, "prescale_gradients": "auto"}, 'prescale_gradients is "auto" in'),
        ({**ZERO, "comms_logger": {"prof_ops": ["auto"]}}, 'comms_logger.prof_ops.0 is "auto" in'),
        ({"zero_optimization": {"stage": 3, "stage4": 1}}, "zero_optimization.stage4 is not a DeepSpeed key"),
        ({"zero_optimization": {"stage": 3, "cpu_offload": True}}, "cpu_offload cannot be set: deprecated; write"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be 0, 1, 2 or 3, got True"),
        ({"zero_optimization": True}, "zero_optimization must be a section with a stage"),
        ({}, "zero_optimization must be a section with a stage"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param works with stage 3"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs a ZeRO stage of 1"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "param.nvme_path is missing"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, "device must be none, cpu or nvme"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"pin": 1}}}, "offload_param.pin is not a DeepSpeed key"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "offload_param must be a section with a device"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
         "super_offload needs DeepSpeed's own optimizer"),
        ("{", "is not a usable JSON file"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ("[]", "must hold one JSON object"),
    ],
)  # fmt: skip
def test_bad_bases(tmp_path: Path, base: object, message: str) -> None:
    recipe = with_base(tmp_path, base)
    with pytest.raises(RecipeError) as caught:
        ds_config(recipe, 1, 4)
    assert "the DeepSpeed configuration cannot be used" in str(caught.value)
    assert message in str(caught.value) and "base.json" in str(caught.value)


def test_json_that_is_not_usable_names_the_duplicate_key() -> None:
    with pytest.raises(ValueError, match="the key 'b' is given twice"):
        module._no_duplicates([("a", 1), ("b", 2), ("b", 3)])


class _Noting(dict):  # type: ignore[type-arg]
    """A configuration that notes which keys DeepSpeed asks for."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Noting:
        return self


def test_key_lists_match_the_installed_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    runtime = pytest.importorskip("deepspeed.runtime.config")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def fields(model: Any) -> set[str]:
        return {info.alias or name for name, info in model.model_fields.items()}

    noting = _Noting(train_batch_size=1, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    runtime.DeepSpeedConfig(noting)
    assert noting.asked == {*module.ACCEPTED, *module.OWNED, *module.REFUSED}
    assert fields(DeepSpeedZeroConfig) == module.ZERO_KEYS | set(module.ZERO_REFUSED)
    assert fields(DeepSpeedBF16Config) == module.BF16_KEYS
    assert fields(DeepSpeedZeroOffloadParamConfig) == module.OFFLOAD_PARAM_KEYS
    assert fields(DeepSpeedZeroOffloadOptimizerConfig) == module.OFFLOAD_OPTIMIZER_KEYS


def test_top_level_lists_do_not_overlap() -> None:
    lists = [set(module.ACCEPTED), set(module.OWNED), set(module.REFUSED)]
    assert sum(map(len, lists)) == len(set.union(*lists))
