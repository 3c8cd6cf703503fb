"""A running mean of the trained weights (EMA; Polyak and Juditsky 1992, arXiv 1703.01780 for evaluating it).

The mean of a weight stands beside Adam's moments in the state of torch's optimizer, in fp32 and for this rank's part
only. So whatever keeps the moments keeps it: DeepSpeed's checkpoints of every ZeRO stage, resuming at another world
size, rollbacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.engine.training import Training
from pipeline.engine.zero_shards import AVERAGE
from pipeline.errors import RecipeError

_AT_ONCE = 1 << 24
"""Elements exchanged at a time: what an evaluation needs besides."""


def check_averaging(engine: Any) -> None:
    """Refuse what keeps no fp32 weights in memory.

    Raises:
        RecipeError: the optimizer's state is on NVMe, or its weights are in 16 bits.
    """
    nvme = engine.zero_nvme_offload_optimizer()
    if nvme or any(weight.dtype != torch.float32 for weight in _states(engine)):
        where = "the optimizer's state is on NVMe" if nvme else "the optimizer's own weights are in 16 bits"
        raise RecipeError(
            f"train.averaging.kind=ema keeps a mean of fp32 weights beside Adam's moments, but {where}; set "
            + ("offload_optimizer.device to cpu" if nvme else "bf16_master_weights_and_grads to false")
            + ", or average checkpoints with `slt ckpt average`"
        )


def update_averages(engine: Any, decay: float, follow: bool) -> None:
    """After a step that was applied.

    Args:
        engine: DeepSpeed's.
        decay: part of the mean that stays.
        follow: the mean is the weights themselves.
    """
    with torch.no_grad():
        for weight, state in _states(engine).items():
            if AVERAGE not in state:
                state[AVERAGE] = weight.detach().clone()
            elif follow:
                state[AVERAGE].copy_(weight)
            else:
                state[AVERAGE].lerp_(weight.detach(), 1 - decay)


@contextlib.contextmanager
def averaged(training: Training) -> Iterator[None]:
    """The model computes with the means inside, and with its own weights, to the bit, behind it; without means nothing
    changes. All ranks must call, between two steps."""
    kind = training.recipe.train.averaging.kind
    if kind == "none" or not any(AVERAGE in state for state in _states(training.engine.engine).values()):
        yield
        return
    _exchange(training.engine.engine)
    try:
        yield
    finally:
        _exchange(training.engine.engine)


def _states(engine: Any) -> dict[torch.Tensor, dict[str, Any]]:
    """The weights that the optimizer changes, which are this rank's part in fp32, and what it keeps of each."""
    optimizer = engine.optimizer
    states: dict[torch.Tensor, dict[str, Any]] = getattr(optimizer, "optimizer", optimizer).state
    return states


def _exchange(engine: Any) -> None:
    with torch.no_grad():
        for weight, state in _states(engine).items():
            pieces = (tensor.detach().view(-1).split(_AT_ONCE) for tensor in (weight, state[AVERAGE]))
            for one, other in zip(*pieces, strict=True):
                before = one.clone()
                one.copy_(other)
                other.copy_(before)
        _show_model(engine)


def _show_model(engine: Any) -> None:
    """Let the model compute with what the optimizer's weights are now, as DeepSpeed 0.19.8 does behind a step."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_groups"):  # stage 0 in bf16; in fp32 the model's weights are the optimizer's
        for halves, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for half, master in zip(halves, masters, strict=True):
                half.data.copy_(master)


__all__ = ["averaged", "check_averaging", "update_averages"]
