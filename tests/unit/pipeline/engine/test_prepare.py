"""What is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.engine.checkpoint import TAG, load
from pipeline.engine.prepare import steps_of
from pipeline.errors import CheckpointError, RecipeError


def test_epochs_that_are_less_than_a_batch() -> None:
    recipe: Any = SimpleNamespace(train=SimpleNamespace(steps=None, epochs=0.5, global_batch=64))
    plan: Any = SimpleNamespace(items_per_epoch=100)
    with pytest.raises(RecipeError, match=r"train\.epochs=0\.5 of 100 items is less than one global batch of 64"):
        steps_of(recipe, plan)
    recipe.train.epochs = 1.5
    assert steps_of(recipe, plan) == 2
    recipe.train.steps = 7
    assert steps_of(recipe, plan) == 7


def test_a_checkpoint_in_which_deepspeed_finds_nothing(tmp_path: Path) -> None:
    deepspeed = SimpleNamespace(
        load_checkpoint=lambda *args, **options: (None, {}), zero_nvme_offload_optimizer=lambda: True
    )
    engine: Any = SimpleNamespace(engine=deepspeed, module=torch.nn.Linear(1, 1))
    checkpoint: Any = SimpleNamespace(path=tmp_path, world_size=1)
    with pytest.raises(CheckpointError, match=f"DeepSpeed found nothing to load in {tmp_path}/{TAG}"):
        load(engine, checkpoint)
