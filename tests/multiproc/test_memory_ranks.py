"""The planner's bytes of weights, gradients and optimizer states against tensors that real ZeRO ranks hold."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from pipeline.memory.lines import BACKWARD
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

BUCKET = 640


def _config(stage: int, bf16: bool, threshold: int, bf16_options: dict[str, bool]) -> dict[str, Any]:
    zero = {
        "stage": stage, "reduce_bucket_size": BUCKET, "overlap_comm": False, "contiguous_gradients": True,
        "stage3_param_persistence_threshold": threshold, "stage3_prefetch_bucket_size": 100,
        "stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 1000,
    }  # fmt: skip
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": bf16, **bf16_options}, "gradient_clipping": 1.0,
    }  # fmt: skip


BF16_STATES = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
# stage, bf16, persistence threshold, options of the bf16 section
CASES: list[tuple[int, bool, int, dict[str, bool]]] = [
    (0, True, 0, {}), (1, False, 0, {}), (1, True, 0, {}), (2, True, 0, {}), (2, True, 0, BF16_STATES),
    (3, False, 0, {}), (3, True, 40, {}), (3, True, 0, BF16_STATES),
]  # fmt: skip
COUNTERS = 64
"""Bytes that are no state of a weight: AdamW's step counts and DeepSpeed's overflow flag."""


def _model(bf16: bool) -> Any:
    """Sizes that divide by neither 2 nor 3; a frozen part, norms and biases."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 13), nn.Linear(13, 17), nn.LayerNorm(17), nn.Linear(17, 5), _SquareSum())
    model[0].requires_grad_(False)
    return model.to(torch.bfloat16) if bf16 else model


def _SquareSum() -> Any:
    from torch import nn

    class SquareSum(nn.Module):
        def forward(self, rows: Any) -> Any:
            return rows.float().square().sum()

    return SquareSum()


def _live() -> int:
    """Bytes of all tensors of this process, each storage once."""
    import torch

    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    tensors += [item.grad for item in tensors if item.is_leaf and item.grad is not None]
    storages = [item.untyped_storage() for item in tensors if item.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _measure(rank: int, world_size: int) -> list[tuple[int, int, str]]:
    """Per case measured and planned bytes after the first backward of the second step, and the plan in words."""
    from pipeline import dist

    dist.init()
    import deepspeed
    import torch

    from pipeline.engine.setup import parameter_groups
    from pipeline.memory.zero import Weight, ZeroSettings, state_lines

    results = []
    for stage, bf16, threshold, options in CASES:
        config = _config(stage, bf16, threshold, options)
        before = _live()
        model = _model(bf16)
        weights = [Weight(n, p.numel(), p.dim(), p.requires_grad) for n, p in model.named_parameters()]
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.01)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        rows = torch.ones(3, 11, dtype=torch.bfloat16 if bf16 else torch.float32)
        for _ in range(3):
            engine.backward(engine(rows), scale_wrt_gas=False)
            engine.step()
        del rows
        # what lives during a collective only; stage 2 frees its buckets after every backward
        absent = {"weights gathered", "communication", *(["reduction buckets"] if stage == 2 else [])}
        lines = [ln for ln in state_lines(weights, ZeroSettings.of(config, world_size)) if ln.item not in absent]
        planned = sum(line.bytes for line in lines if BACKWARD in line.phases)
        results.append((_live() - before, planned, ", ".join(f"{line.item} {line.bytes}" for line in lines)))
        engine.destroy()
        del engine, model, optimizer
    return results


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_byte_of_the_states_is_planned(ranks: int) -> None:
    """The rank that keeps most holds exactly what is planned; no rank holds more."""
    results = run_ranks(_measure, ranks, timeout=300)
    for case, of_ranks in zip(CASES, zip(*results, strict=True), strict=True):
        planned, words = of_ranks[0][1:]
        most = max(measured for measured, _, _ in of_ranks)
        assert 0 <= most - planned <= COUNTERS, f"{ranks} ranks, {case}: {most} measured, {planned} planned: {words}"
