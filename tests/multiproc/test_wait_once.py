"""Real ZeRO engines that wait once take the very steps of those that wait several times, and skip the same ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import dist
from pipeline.engine.setup import quiet_deepspeed
from pipeline.engine.wait_once import wait_once
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

ENGINES = [(1, True, 0.0), (1, True, 0.05), (2, False, 0.05), (3, True, 0.05), (3, False, 0.0)]
"""ZeRO stage, bf16 or fp32, clipping."""


def take_steps(rank: int, world_size: int) -> list[tuple[list[Any], list[Any]]]:
    """Per engine the norms, skips and weights, without and with `wait_once`."""
    dist.init()
    return [(steps_of(*engine, once=False), steps_of(*engine, once=True)) for engine in ENGINES]


def steps_of(zero: int, bf16: bool, clip: float, once: bool) -> list[Any]:
    import deepspeed

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    groups = [{"params": [model[0].weight, model[2].weight]}, {"params": [*model[1].parameters(), model[2].bias]}]
    model[0].bias.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": clip,
        "bf16": {"enabled": bf16}, "zero_optimization": {"stage": zero}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    with quiet_deepspeed():
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    if once:
        wait_once(engine.optimizer)
    found: list[Any] = []
    for step in range(4):
        inputs = torch.arange(8.0).view(2, 4).add(dist.rank() + step).to(next(model.parameters()).dtype)
        loss = engine(inputs).float().sum()
        # the second step has an infinite loss on one rank, the third a norm that no float holds
        engine.backward(loss * (float("inf") if step == 1 and dist.rank() == 1 else 1e30 if step == 2 else 1.0))
        engine.step()
        found.append((float(engine.get_global_grad_norm()), engine.skipped_steps))
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=zero == 3):
        found += copy.deepcopy([parameter.detach().tolist() for parameter in model.parameters()])
    engine.destroy()
    return found


def test_the_same_steps() -> None:
    for by_rank in run_ranks(take_steps, 2, timeout=180):
        for engine, (without, once) in zip(ENGINES, by_rank, strict=True):
            assert once == without, engine
            assert [skipped for _, skipped in once[:2]] == [0, 1], engine
