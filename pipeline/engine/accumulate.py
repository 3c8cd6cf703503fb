"""One optimizer step over the micro-batches of a rank, in one of two ways, as the stage asks.

`summed`: the loss is a sum over tokens, so micro-batches are independent. `cached`: the loss couples all samples
of the global batch (negatives), so features are computed first without graphs, the loss gives their gradients, and
a second forward turns these into weight gradients (GradCache, arXiv 2101.06983). The result does not depend on how
the global batch is cut into ranks and micro-batches. What has no weights to train may run in the first pass alone
(`CachedStage.for_replay`).
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.engine.gate import finite_or_nothing
from pipeline.engine.setup import TrainEngine
from pipeline.stages.base import AnyStage, CachedStage, LossParts, Normaliser


def accumulate(
    engine: TrainEngine, stage: AnyStage, batches: list[Any], normaliser: Normaliser
) -> dict[str, torch.Tensor]:
    """Forward, backward and step all micro-batches; returns the stage's local sums (detached scalars)."""
    if isinstance(stage, CachedStage):
        losses = (_single if len(batches) == 1 else _cached)(engine, stage, batches, normaliser)
        return losses.sums
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        losses = stage.loss(engine.training_forward, batch, normaliser)
        engine.backward(losses.loss)
        engine.step()
        for name, value in losses.sums.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _single(engine: TrainEngine, stage: CachedStage[Any], batches: list[Any], normaliser: Normaliser) -> LossParts:
    """One micro-batch needs no cache: the graph of its forward still exists."""
    losses = stage.contrast([stage.features(engine.training_forward, batches[0])], batches, normaliser)
    engine.backward(losses.loss)
    engine.step()
    return losses


def _cached(engine: TrainEngine, stage: CachedStage[Any], batches: list[Any], normaliser: Normaliser) -> LossParts:
    states, leaves = [], []
    for at, batch in enumerate(batches):
        states.append(_random_state())
        with torch.no_grad():
            features = stage.features(engine.training_forward, batch)
        batches[at] = stage.for_replay(batch, features)  # in the caller's list: what it replaces can be freed
        leaves.append({n: v.detach().requires_grad_(v.is_floating_point()) for n, v in features.items()})
    losses = stage.contrast(leaves, batches, normaliser)
    differentiable = [
        (at, name) for at, part in enumerate(leaves) for name, value in part.items() if value.requires_grad
    ]
    loss = finite_or_nothing(losses.loss)
    grads = torch.autograd.grad(loss, [leaves[at][name] for at, name in differentiable], allow_unused=True)
    gradient = {key: grad for key, grad in zip(differentiable, grads, strict=True) if grad is not None}
    for at, batch in enumerate(batches):
        _restore_random_state(states[at])  # dropout of the replay must equal the first pass
        features = stage.features(engine.training_forward, batch)
        surrogate = torch.zeros((), device=stage.device)
        for name, value in features.items():
            if (at, name) in gradient:
                surrogate = surrogate + (_wide(value) * _wide(gradient[at, name])).sum()
            elif value.requires_grad:
                # every rank must reach every parameter in every micro-batch, or ZeRO's reductions differ
                surrogate = surrogate + _wide(value).sum() * 0.0
        engine.backward(surrogate)
        engine.step()
    return losses


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _restore_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
