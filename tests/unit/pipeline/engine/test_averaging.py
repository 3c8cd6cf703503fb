"""A mean of the weights needs fp32 weights in memory; what it is, tests/multiproc/test_averaging.py says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.transfer_schema import AveragingConfig
from pipeline.engine.averaging import averaged, check_averaging, update_averages
from pipeline.engine.observers.average import Average
from pipeline.engine.observers.base import FinishedStep, Wishes
from pipeline.engine.state import TrainState
from pipeline.errors import RecipeError
from shards.load.requests import StepBatch
from shards.order.plan import Cursor


def engine(dtype: torch.dtype = torch.float32, nvme: bool = False) -> Any:
    """Without ZeRO: the model's weights are the optimizer's."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return SimpleNamespace(
        optimizer=optimizer, weight=weight, zero_nvme_offload_optimizer=lambda: nvme, zero_optimization_stage=lambda: 0
    )


def training(step: int, **rule: Any) -> Any:
    train = SimpleNamespace(averaging=AveragingConfig(**rule))
    return SimpleNamespace(
        engine=SimpleNamespace(engine=engine()), recipe=SimpleNamespace(train=train), state=TrainState(step=step)
    )


def test_what_keeps_no_fp32_weights_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"state is on NVMe; set offload_optimizer\.device to cpu, or average"):
        check_averaging(engine(nvme=True))
    with pytest.raises(RecipeError, match="own weights are in 16 bits; set bf16_master_weights_and_grads to false, or"):
        check_averaging(engine(dtype=torch.bfloat16))
    check_averaging(engine())


def test_only_applied_steps_count_and_the_mean_follows_up_to_its_start() -> None:
    run = training(1, kind="ema", decay=0.5, start=2)
    weight = run.engine.engine.weight
    observer, batch = Average(run), StepBatch([], Cursor(), [], 0.0, 0)
    means = []
    for value, applied in ((1.0, True), (2.0, True), (4.0, True), (9.0, False)):
        weight.data.fill_(value)
        observer.on_step(FinishedStep(batch, 0, 0, 0.0, {}, False, applied), Wishes(), 0)
        run.state.step += 1
        with averaged(run):
            means.append(weight.tolist())
        assert weight.tolist() == [value] * 2
    assert means == [[1.0] * 2, [2.0] * 2, [3.0] * 2, [3.0] * 2]


def test_a_run_without_a_mean_computes_with_its_weights() -> None:
    run = training(1, kind="none")
    update_averages(run.engine.engine, 0.5, follow=False)
    run.engine.engine.weight.data.fill_(7.0)
    with averaged(run):
        assert run.engine.engine.weight.tolist() == [7.0] * 2
