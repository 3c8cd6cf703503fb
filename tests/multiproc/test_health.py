"""A step that is not finite somewhere is applied nowhere: real ranks, real DeepSpeed.

The oracle of a skipped step is a run that leaves its forward, backward and update out altogether.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from pipeline import dist
from pipeline.engine.training import Training
from pipeline.stages.base import LossParts
from tests.jobs import World
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

BAD_STEP = 2
STEPS = 4
SETTINGS = {
    "train__steps": STEPS, "data__eval": "[]", "train__health__on_spike": "skip",
    "train__health__spike_window_steps": 1,
}  # fmt: skip
ZERO = "{{zero_optimization: {{stage: {0}}}}}"
COMBINATIONS = [
    *[("continued_pretraining", zero, "fp32", "loss") for zero in (0, 2, 3)],
    *[("continued_pretraining", zero, "bf16", "gradient") for zero in (0, 1, 3)],
    ("contrastive", 1, "bf16", "loss"), ("contrastive", 3, "fp32", "gradient"),
    ("connector", 0, "fp32", "gradient"), ("connector", 3, "bf16", "loss"),
]  # fmt: skip
"""Stage, ZeRO stage, precision, and what is not finite."""
ZERO_3 = COMBINATIONS.index(("continued_pretraining", 3, "fp32", "loss"))
SPIKES = (0, ZERO_3, COMBINATIONS.index(("continued_pretraining", 1, "bf16", "gradient")))


class Run(NamedTuple):
    """What is left of a run on one rank."""

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    skipped_total: int
    slowest: list[tuple[float, float]]
    """Rank, and its own time over the median rank's."""
    digest: str
    """Of weights, moments and Adam's counts, as this rank holds them."""


def prepared(stage: str, sets: list[str], world_size: int) -> Training:
    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve
    from pipeline.engine.phases import Phases
    from pipeline.engine.prepare import prepare
    from pipeline.engine.signals import StopFlag
    from pipeline.stages.registry import stage_class

    resolved = resolve(load_recipe(f"demo_{stage}", sets), world_size)
    Path(resolved.recipe.run_dir).mkdir(parents=True, exist_ok=True)
    ranks = dist.ranks_from_environment()
    return prepare(resolved, stage_class(stage), ranks, torch.device("cpu"), StopFlag(), Phases())


def train(stage: str, sets: list[str], world_size: int, way: str) -> Run:
    from pipeline.engine.observers.base import Observer
    from pipeline.engine.observers.registry import OBSERVERS
    from pipeline.engine.trainer import Trainer

    training = prepared(stage, sets, world_size)
    losses: list[float] = []
    norms: list[float] = []
    applied: list[bool] = []
    slowest: list[tuple[float, float]] = []

    class Watch(Observer):
        def on_step(self, step: Any, wishes: Any, votes: int) -> dict[str, float]:
            losses.append(wishes.metrics["train/loss"])
            norms.append(step.grad_norm)
            applied.append(step.applied)
            slowest.append((wishes.metrics.get("perf/slowest_rank", 0), wishes.metrics.get("perf/straggler_ratio", 1)))
            return {}

    with WAYS[way](training):
        Trainer(
            training, [*(kind(training) for kind in OBSERVERS if kind.enabled(training.recipe)), Watch(training)], []
        ).fit()
    digest = digest_of(training.engine)
    training.engine.destroy()
    return Run(losses, norms, applied, training.state.skipped_total, slowest, digest)


def digest_of(engine: Any) -> str:
    """Of all parameters and of what this rank's optimizer remembers."""
    import deepspeed

    optimizer = getattr(engine.engine.optimizer, "optimizer", engine.engine.optimizer)
    found = hashlib.sha256()

    def add(tensor: torch.Tensor) -> None:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.engine.zero_optimization_stage() == 3):
        for parameter in parameters:
            add(parameter)
    for state in optimizer.state.values():
        for name in sorted(state):
            add(state[name])
    return found.hexdigest()


@contextlib.contextmanager
def injured(kind: str, training: Training) -> Iterator[None]:
    """In one step, on the last rank alone, the second micro-batch (of a cached stage: the loss) is not finite, or far
    too large."""
    stage: Any = training.stage
    name = "contrast" if hasattr(stage, "contrast") else "loss"
    method, calls = getattr(stage, name), 0

    def wounded(*args: Any) -> LossParts:
        nonlocal calls
        parts = method(*args)
        calls += 1
        at = (BAD_STEP - 1) * (1 if name == "contrast" else training.resolved.accumulation_steps) + 1
        if training.ranks.rank != training.ranks.world_size - 1 or calls != at:
            return parts
        if kind == "loss":  # its gradients are finite
            return replace(
                parts, loss=parts.loss + math.inf, sums={**parts.sums, "loss": parts.sums["loss"] * math.nan}
            )
        if kind == "spike":
            return replace(parts, loss=parts.loss * 1e3)
        parts.loss.register_hook(lambda grad: grad * math.nan)
        return parts

    with mock.patch.object(stage, name, wounded):
        yield


@contextlib.contextmanager
def left_out(training: Training) -> Iterator[None]:
    """The step without forward, backward and update."""
    from pipeline.engine import trainer

    original = trainer.accumulate
    sums: dict[str, torch.Tensor] = {}

    def accumulate(engine: Any, *args: Any) -> dict[str, torch.Tensor]:
        if training.state.step + 1 != BAD_STEP:
            sums.update(original(engine, *args))
            return dict(sums)
        engine.gate.applied, engine.gate.grad_norm = False, math.inf
        return {name: value * math.nan for name, value in sums.items()}

    with mock.patch.object(trainer, "accumulate", accumulate):
        yield


@contextlib.contextmanager
def slow(training: Training) -> Iterator[None]:
    """The last rank computes a little longer in every forward pass, and all ranks wait for it."""
    late = training.ranks.rank == training.ranks.world_size - 1
    with training.engine.module.register_forward_pre_hook(lambda *_: time.sleep(0.05 * late)):
        yield


WAYS: dict[str, Callable[[Training], AbstractContextManager[None]]] = {
    "loss": functools.partial(injured, "loss"),
    "gradient": functools.partial(injured, "gradient"),
    "spike": functools.partial(injured, "spike"),
    "left out": left_out,
    "slow": slow,
}


def train_all(rank: int, world_size: int, jobs: list[tuple[str, list[str], list[str]]]) -> list[dict[str, Run]]:
    dist.init()
    return [{way: train(stage, sets, world_size, way) for way in ways} for stage, sets, ways in jobs]


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Run]]]:
    folder = tmp_path_factory.mktemp("health")
    jobs = []
    for stage, zero, precision, bad in COMBINATIONS:
        run_dir, overrides = folder / f"{stage}-{zero}-{precision}", ZERO.format(zero)
        values = {**SETTINGS, "train__precision": precision, "deepspeed__overrides": overrides}
        jobs.append((stage, world.sets(stage, run_dir, 2, **values), [bad, "left out"]))
    jobs[ZERO_3][2].append("slow")
    for at in SPIKES:
        jobs[at][2].append("spike")
    return run_ranks(train_all, 2, jobs, timeout=400)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_a_step_that_is_not_finite_on_one_rank_is_applied_on_none(
    combination: tuple[str, int, str, str], runs: list[list[dict[str, Run]]]
) -> None:
    """To the bit the run that leaves the step out."""
    at = COMBINATIONS.index(combination)
    for of_rank in runs:
        run, reference = of_rank[at][combination[-1]], of_rank[at]["left out"]
        assert run.applied == reference.applied == [True, False, True, True]
        assert run.skipped_total == 1 and run.norms[BAD_STEP - 1] == math.inf
        assert run.digest == reference.digest
        assert run.norms == reference.norms and run.losses[BAD_STEP:] == reference.losses[BAD_STEP:]
        assert all(map(math.isfinite, run.losses[BAD_STEP:]))


@pytest.mark.parametrize("at", SPIKES)
def test_a_spike_is_refused_before_weights_change(at: int, runs: list[list[dict[str, Run]]]) -> None:
    for of_rank in runs:
        run, reference = of_rank[at]["spike"], of_rank[at]["left out"]
        assert run.applied == reference.applied and run.digest == reference.digest
        assert 10 * run.norms[0] < run.norms[BAD_STEP - 1] < math.inf, "it is known, nevertheless"
        assert run.norms[BAD_STEP:] == reference.norms[BAD_STEP:]


def test_one_rank_skips_like_two(
    world: World, runs: list[list[dict[str, Run]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sets = world.sets("continued_pretraining", tmp_path_factory.mktemp("alone"), 1, **SETTINGS, train__precision="fp32")
    ((alone,),) = run_ranks(train_all, 1, [("continued_pretraining", sets, ["loss", "left out"])], timeout=180)
    two = runs[0][ZERO_3]["loss"]
    assert alone["loss"].digest == alone["left out"].digest and alone["loss"].applied == two.applied
    for name in ("losses", "norms"):
        assert getattr(alone["loss"], name) == pytest.approx(getattr(two, name), rel=3e-3, nan_ok=True)


def test_the_rank_that_holds_up_the_others_is_known(runs: list[list[dict[str, Run]]]) -> None:
    """Under ZeRO-3, whose collectives in every layer make all ranks equally late."""
    assert runs[0][ZERO_3]["slow"].slowest == runs[1][ZERO_3]["slow"].slowest
    assert all(rank == 1 and times > 1.4 for rank, times in runs[0][ZERO_3]["slow"].slowest)
