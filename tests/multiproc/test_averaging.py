"""The mean of the weights equals a slow one in float64, whatever shards it; the model computes with it when asked, and
other layouts take it over to the bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import dist
from pipeline.config.transfer_schema import AveragingConfig
from pipeline.engine.averaging import averaged, update_averages
from pipeline.engine.elastic import load_elastically, renew_adam
from pipeline.engine.zero_shards import AVERAGE, KINDS, ZeroShards
from tests.ranks import run_ranks
from tests.zero_engines import Kind, start, take_steps

pytestmark = pytest.mark.multiproc

DECAY, START, STEPS = 0.75, 2, 5
KEPT = [
    *(Kind(stage) for stage in (0, 1, 2, 3)), *(Kind(stage, bf16=True) for stage in (0, 2, 3)),
    Kind(2, small_groups=True), Kind(3, small_groups=True), Kind(3, True, offload=True),
    Kind(1, True, fp32_gradients=True),
]  # fmt: skip
SWITCHES = [
    (Kind(0), Kind(3)), (Kind(3), Kind(1)), (Kind(2, small_groups=True), Kind(3)), (Kind(3, True), Kind(0, True)),
]  # fmt: skip
"""What one rank takes over from two, under which stage."""


def folder_of(kind: Kind, folder: Path) -> Path:
    return folder / "-".join(str(int(value)) for value in kind)


def save(engine: Any, folder: Path) -> ZeroShards:
    engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
    return ZeroShards.open(folder / "deepspeed")


def live(engine: Any) -> dict[str, torch.Tensor]:
    """What the forward pass reads."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: parameter.detach().clone() for name, parameter in parameters.items() if parameter.requires_grad}


def average(rank: int, world_size: int, folder: Path) -> dict[Kind, dict[str, float]]:
    """By kind: the largest distance from the reference, by parameter."""
    dist.init()
    found = {}
    for kind in KEPT:
        engine, reference = start(kind, world_size), dict[str, torch.Tensor]()
        training: Any = SimpleNamespace(
            engine=SimpleNamespace(engine=engine), recipe=SimpleNamespace(train=SimpleNamespace(averaging=None))
        )
        training.recipe.train.averaging = AveragingConfig(kind="ema", decay=DECAY)
        with averaged(training):
            pass  # before the first step there is no mean
        for step in range(1, STEPS + 1):
            take_steps(engine, rank, world_size, step, 1)
            update_averages(engine, DECAY, follow=step <= START)
            shards = save(engine, folder_of(kind, folder))
            for name in shards.parameters:
                weight = shards.tensor(name).double()
                reference[name] = weight if step <= START else DECAY * reference[name] + (1 - DECAY) * weight
        assert shards.kinds == (*KINDS, AVERAGE) and shards.exported == AVERAGE
        means = {name: shards.tensor(name, AVERAGE) for name in shards.parameters}
        found[kind] = {name: float((means[name].double() - mean).abs().max()) for name, mean in reference.items()}
        check_use(engine, training, means)
        take_steps(engine, rank, world_size, STEPS + 1, 1)  # goes on as if nothing had been
        engine.destroy()
    return found


def check_use(engine: Any, training: Any, means: dict[str, torch.Tensor]) -> None:
    """The model computes with the means inside, and with its weights to the bit behind."""
    before, module = live(engine), engine.module
    tokens = torch.arange(11).view(1, 11)
    loss = engine(tokens).item()
    with averaged(training):
        inside = live(engine)
        assert all(torch.equal(inside[name], means[name].to(inside[name].dtype)) for name in means)
        assert engine(tokens).item() != loss
    assert all(torch.equal(before[name], value) for name, value in live(engine).items())
    assert engine(tokens).item() == loss and module is engine.module


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Kind, dict[str, float]]]]:
    folder = tmp_path_factory.mktemp("averages")
    return folder, run_ranks(average, 2, folder, timeout=240)


def test_the_mean_is_that_of_a_slow_reference(saved: tuple[Path, list[dict[Kind, dict[str, float]]]]) -> None:
    for of_rank in saved[1]:
        for kind, distances in of_rank.items():
            assert len(distances) == 8 and max(distances.values()) < 3e-7, kind


def test_one_rank_has_the_mean_of_two(saved: tuple[Path, list[dict[Kind, dict[str, float]]]], tmp_path: Path) -> None:
    run_ranks(average, 1, tmp_path, timeout=240)
    for kind in KEPT:
        one, two = (ZeroShards.open(folder_of(kind, folder) / "deepspeed") for folder in (tmp_path, saved[0]))
        tolerance = 2e-2 if kind.bf16 else 2e-5
        for name in one.parameters:
            assert torch.allclose(one.tensor(name, AVERAGE), two.tensor(name, AVERAGE), atol=tolerance), (kind, name)


def take_over(rank: int, world_size: int, folder: Path, out: Path) -> None:
    dist.init()
    for number, (kind, loads) in enumerate(SWITCHES):
        engine = start(loads, world_size)
        load_elastically(engine, ZeroShards.open(folder_of(kind, folder) / "deepspeed"))
        renew_adam(engine.optimizer)
        save(engine, out / str(number))
        take_steps(engine, rank, world_size, STEPS + 1, 1)
        update_averages(engine, DECAY, follow=False)
        engine.destroy()


def test_another_layout_takes_the_mean_over_to_the_bit(
    saved: tuple[Path, list[dict[Kind, dict[str, float]]]], tmp_path: Path
) -> None:
    run_ranks(take_over, 1, saved[0], tmp_path, timeout=240)
    for number, (kind, _) in enumerate(SWITCHES):
        paths = (folder_of(kind, saved[0]), tmp_path / str(number))
        before, after = (ZeroShards.open(path / "deepspeed") for path in paths)
        assert after.world_size == 1 and after.exported == AVERAGE
        for name in before.parameters:
            for of in before.kinds:
                assert torch.equal(before.tensor(name, of), after.tensor(name, of)), (kind, name, of)
