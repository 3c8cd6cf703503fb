"""What goes into the optimizer, and the engine checked against the recipe."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.load import load_recipe
from pipeline.config.parts_schema import PartConfig
from pipeline.config.rates import rates_of
from pipeline.config.resolve import ResolvedRecipe, resolve
from pipeline.config.train_schema import OptimizerConfig
from pipeline.engine.setup import TrainEngine, check_engine, parameter_groups, quiet_deepspeed
from pipeline.errors import RecipeError


def resolved() -> ResolvedRecipe:
    sets = ["train.global_batch=24", "train.micro_batch=3", "train.optimizer.clip_norm=0.5", "train.world_sizes=[2]"]
    return resolve(load_recipe("demo_contrastive", sets), 2)


def engine_of(recipe: ResolvedRecipe, **changes: Any) -> SimpleNamespace:
    """A DeepSpeed engine that answers what the recipe says, but for ``changes``."""
    train = recipe.recipe.train
    answers = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": recipe.accumulation_steps,
        "bfloat16_enabled": train.precision == "bf16",
        "zero_optimization_stage": recipe.ds_config["zero_optimization"]["stage"],
        "gradient_clipping": train.optimizer.clip_norm,
        **changes,
    }
    return SimpleNamespace(**{name: lambda value=value: value for name, value in answers.items()})


def test_biases_norms_and_scales_are_not_decayed_and_frozen_weights_are_left_out() -> None:
    module = torch.nn.ModuleDict(
        {"linear": torch.nn.Linear(3, 2), "norm": torch.nn.LayerNorm(2), "frozen": torch.nn.Linear(2, 2)}
    )
    module["frozen"].requires_grad_(False)
    partitioned = torch.nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it: the true shape is an attribute
    partitioned.ds_shape = torch.Size((5, 4))  # type: ignore[attr-defined]
    module.register_parameter("partitioned", partitioned)
    decayed, plain = parameter_groups(module, 0.1)
    linear, norm = module["linear"], module["norm"]
    assert {id(p) for p in decayed["params"]} == {id(linear.weight), id(partitioned)}
    assert {id(p) for p in plain["params"]} == {id(linear.bias), id(norm.weight), id(norm.bias)}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert [len(group["params"]) for group in parameter_groups(torch.nn.LayerNorm(2), 0.1)] == [2], "no empty group"


def test_an_engine_that_took_the_recipe() -> None:
    recipe = resolved()
    assert recipe.accumulation_steps == 4
    check_engine(engine_of(recipe), recipe)


def test_an_engine_counts_the_slices_of_sequences() -> None:
    sets = ["train.world_sizes=[4]", "train.sequence_parallel=2"]
    recipe = resolve(load_recipe("demo_continued_pretraining", sets), 4)
    slices = 2 * recipe.recipe.train.global_batch
    check_engine(engine_of(recipe, train_batch_size=slices), recipe)
    with pytest.raises(RecipeError, match=rf"global_batch: recipe {slices}, engine {slices // 2}"):
        check_engine(engine_of(recipe), recipe)


def test_an_engine_that_did_not_take_the_recipe_is_refused_by_field() -> None:
    recipe = resolved()
    engine = engine_of(recipe, train_batch_size=48, gradient_clipping=0.0, bfloat16_enabled=True)
    with pytest.raises(RecipeError) as error:
        check_engine(engine, recipe)
    assert str(error.value).splitlines() == [
        "DeepSpeed did not take the recipe's values:",
        "  train.global_batch: recipe 24, engine 48",
        "  train.precision bf16: recipe False, engine True",
        "  train.optimizer.clip_norm: recipe 0.5, engine 0.0",
    ]


def test_the_learning_rate_reaches_every_group() -> None:
    groups = [{"lr": 9.0}, {"lr": 9.0}]
    # as without ZeRO: an optimizer of torch
    stub = SimpleNamespace(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0))
    stub.optimizer.param_groups[:] = groups
    engine = TrainEngine(
        stub, torch.device("cpu"), OptimizerConfig(lr=0.4, warmup_steps=4), total_steps=10, keep_alive=None
    )
    assert engine.set_learning_rate(1) == pytest.approx(0.2)
    assert [group["lr"] for group in groups] == [pytest.approx(0.2)] * 2


def test_parts_have_their_own_rates() -> None:
    module = torch.nn.ModuleDict({"llm": torch.nn.Linear(2, 2), "connector": torch.nn.Linear(2, 2, bias=False)})
    names = [name for name, _ in module.named_parameters()]
    config = OptimizerConfig(lr=0.4, warmup_steps=2, schedule="constant")
    rates = rates_of(names, {"llm": PartConfig(lr=0.1, start_step=4)}, config.lr)
    groups = parameter_groups(module, 0.1, rates)
    assert [group["names"] for group in groups] == [["llm.weight"], ["llm.bias"], ["connector.weight"]]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    engine = TrainEngine(
        SimpleNamespace(optimizer=optimizer), torch.device("cpu"), config, 10, None,
        [rates[group["names"][0]] for group in groups],
    )  # fmt: skip
    seen = []
    for step in range(6):
        assert engine.set_learning_rate(step) == pytest.approx(0.2 if step == 0 else 0.4)
        seen.append([group["lr"] for group in optimizer.param_groups])
        assert engine.part_rates == {"llm": seen[-1][0]}
    assert [row[2] for row in seen] == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4, 0.4])
    assert [row[0] for row in seen] == pytest.approx([0, 0, 0, 0, 0.05, 0.1]), "its own warm-up after its start"


def test_deepspeeds_loggers_get_their_level_back() -> None:
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    with pytest.raises(ValueError), quiet_deepspeed():
        assert logger.level == logging.WARNING
        raise ValueError
    assert logger.level == before
