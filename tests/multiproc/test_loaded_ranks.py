"""Weights of a pretrained part under ZeRO-3, where every rank holds a part of each tensor."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import dist
from pipeline.errors import CheckpointError
from tests.jobs import World
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

STAGE = "continued_pretraining"


def refusals(rank: int, world_size: int, sets: list[str]) -> list[str]:
    """What is said of the model as it was loaded, and after somebody has initialised it again."""
    import deepspeed

    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve
    from pipeline.engine.loaded import check_loaded
    from pipeline.engine.phases import Phases
    from pipeline.engine.prepare import prepare
    from pipeline.engine.signals import StopFlag
    from pipeline.stages.registry import stage_class

    ranks = dist.init()
    deepspeed.init_distributed("gloo", verbose=False)  # the ranks of a test have a group already
    recipe = load_recipe(f"demo_{STAGE}", sets)
    training = prepare(
        resolve(recipe, world_size), stage_class(STAGE), ranks, dist.device_for(ranks), StopFlag(), Phases()
    )  # fmt: skip
    module = training.stage.module
    weights = [weight for weight in module.parameters() if len(weight.ds_shape) > 1]
    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0):
        if rank == 0:
            for weight in weights:
                weight.data.add_(1.0)
    try:
        check_loaded(module, recipe.model)
    except CheckpointError as error:
        return [str(error)]
    return []


def save_llm(folder: Path, tokenizer: Path) -> None:
    """A tiny one with random weights."""
    import torch

    from pipeline.config.schema import LlmConfig, TinyLlm
    from pipeline.models.language import load_llm, load_tokenizer

    sizes = TinyLlm(width=32, layers=2, heads=2, feed_forward=64, max_positions=256)
    config = LlmConfig(tiny=sizes, tokenizer=str(tokenizer))
    load_llm(config, torch.float32).save_pretrained(folder)
    load_tokenizer(config).save_pretrained(folder)


def test_weights_that_are_spread_over_ranks(corpus: World, tmp_path: Path) -> None:
    save_llm(tmp_path / "llm", corpus.tokenizer)
    sets = corpus.sets(STAGE, tmp_path / "run", 2, model__llm=f"{{path: {tmp_path / 'llm'}}}")
    said = run_ranks(refusals, 2, sets)
    assert said[0] == said[1], "every rank raises"
    assert f" of {tmp_path}/llm/model.safetensors did not reach the model, which differs by up to 1;" in said[0][0]
