"""Engines that shard otherwise than those that saved take over weights and moments to the bit, and train on alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import dist
from pipeline.engine import checkpoint as checkpoints
from pipeline.engine.checkpoint import Checkpoint
from pipeline.engine.elastic import layout_of, load_elastically, renew_adam
from pipeline.engine.reshard import to_universal
from pipeline.engine.zero_shards import KINDS, ZeroShards
from pipeline.errors import CheckpointError
from tests.ranks import run_ranks
from tests.zero_engines import Kind, start, take_steps

pytestmark = pytest.mark.multiproc

SAVED_BY = 2
NO_FROZEN = {"exclude_frozen_parameters": True}
KEPT = [
    *(Kind(stage) for stage in (0, 1, 3)), *(Kind(stage, bf16=True) for stage in (0, 2, 3)),
    Kind(2, small_groups=True), Kind(1, True, fp32_gradients=True),
]  # fmt: skip
"""What two ranks save."""
SWITCHES = {
    1: [
        (Kind(0), Kind(0)), (Kind(0), Kind(2)), (Kind(1), Kind(3)), (Kind(2, True), Kind(0, True)),
        (Kind(2, True), Kind(3, True)), (Kind(3), Kind(3)),
    ],
    2: [
        (Kind(0), Kind(3)), (Kind(0, True), Kind(3, True, offload=True)), (Kind(1), Kind(0)),
        (Kind(1), Kind(2, small_groups=True)), (Kind(2, small_groups=True), Kind(2)), (Kind(3), Kind(0)),
        (Kind(3), Kind(1, offload=True)), (Kind(3), Kind(3, small_groups=True)),
        (Kind(0, True), Kind(1, True, fp32_gradients=True)), (Kind(1, True, fp32_gradients=True), Kind(3, True)),
    ],
    3: [
        (Kind(1), Kind(1)), (Kind(2, small_groups=True), Kind(0)), (Kind(2, small_groups=True), Kind(1)),
        (Kind(3), Kind(1)), (Kind(3), Kind(3)), (Kind(3, True), Kind(2, True)),
    ],
    4: [(Kind(3), Kind(3)), (Kind(1), Kind(2))],
}  # fmt: skip
"""By the world size that goes on: what was saved, what loads it."""
UNIVERSAL = [(Kind(0), Kind(1)), (Kind(3), Kind(3)), (Kind(1), Kind(3))]
"""What was saved, and what loads its universal copy at three ranks with DeepSpeed's own loader."""


def test_every_pair_of_stages_is_there() -> None:
    pairs = {(saved.stage, loads.stage) for switches in SWITCHES.values() for saved, loads in switches}
    assert pairs == {(saved, loads) for saved in range(4) for loads in range(4)}


def name_of(kind: Kind) -> str:
    return "-".join(str(int(value)) for value in kind)


def save_and_go_on(rank: int, world_size: int, folder: Path) -> dict[str, list[float]]:
    """Two steps, a checkpoint, two more steps; returns the losses of these by kind."""
    dist.init()
    losses = {}
    for kind in KEPT:
        engine = start(kind, world_size)
        take_steps(engine, rank, world_size, 0, 2)
        engine.module.scale.mul_(0.5)
        engine.save_checkpoint(str(folder / name_of(kind)), tag="deepspeed", save_latest=False, **NO_FROZEN)
        losses[name_of(kind)] = take_steps(engine, rank, world_size, 2, 2)
        engine.destroy()
    return losses


def load_and_go_on(rank: int, world_size: int, folder: Path, out: Path) -> list[list[float]]:
    dist.init()
    losses = []
    for number, (saved, loads) in enumerate(SWITCHES[world_size]):
        shards = ZeroShards.open(folder / name_of(saved) / "deepspeed")
        engine = start(loads, world_size)
        load_elastically(engine, shards)
        renew_adam(engine.optimizer)
        if rank == 0 or loads.stage == 3:
            check_module(engine, shards, loads)
        assert engine.global_steps == 2
        assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.1, 0.0]
        engine.save_checkpoint(str(out / str(number)), tag="deepspeed", save_latest=False, **NO_FROZEN)
        losses.append(take_steps(engine, rank, world_size, 2, 2))
        assert len({float(state["step"]) for state in inner(engine).state.values()}) == 1
        engine.destroy()
    return losses


def load_universal(rank: int, world_size: int, folder: Path, out: Path) -> None:
    dist.init()
    for number, (saved, loads) in enumerate(UNIVERSAL):
        copy = checkpoints.universal_folder(folder / name_of(saved))
        engine = start(loads, world_size, load_universal=True)
        engine.load_checkpoint(str(copy))
        engine.save_checkpoint(str(out / str(number)), tag="deepspeed", save_latest=False, **NO_FROZEN)
        engine.destroy()


def test_deepspeed_loads_a_universal_copy(kept: tuple[Path, list[dict[str, list[float]]]], tmp_path: Path) -> None:
    for saved, _ in UNIVERSAL:
        to_universal(Checkpoint(kept[0] / name_of(saved), {}))
    run_ranks(load_universal, 3, kept[0], tmp_path, timeout=240)
    for number, (saved, _) in enumerate(UNIVERSAL):
        before, after = (
            ZeroShards.open(path / "deepspeed") for path in (kept[0] / name_of(saved), tmp_path / str(number))
        )
        for name in before.parameters:
            assert before.step(name) == after.step(name) == 2
            for kind in KINDS:
                assert torch.equal(before.tensor(name, kind), after.tensor(name, kind)), (saved, name, kind)


def inner(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def check_module(engine: Any, shards: ZeroShards, kind: Kind) -> None:
    """What the forward pass reads are the masters, rounded at most to its own precision."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=kind.stage == 3):
        for name, parameter in engine.module.named_parameters():
            if name in shards.parameters:
                assert torch.equal(parameter, shards.tensor(name).to(parameter.dtype)), name
    assert engine.module.scale.item() == 0.25


def mean(by_rank: list[list[float]]) -> list[float]:
    return [sum(losses) / len(losses) for losses in zip(*by_rank, strict=True)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, list[float]]]]:
    folder = tmp_path_factory.mktemp("kept")
    return folder, run_ranks(save_and_go_on, SAVED_BY, folder, timeout=240)


@pytest.mark.parametrize("world_size", SWITCHES)
def test_another_layout_takes_over_to_the_bit(
    world_size: int, kept: tuple[Path, list[dict[str, list[float]]]], tmp_path: Path
) -> None:
    folder, losses = kept
    went_on = run_ranks(load_and_go_on, world_size, folder, tmp_path, timeout=240)
    for number, (saved, loads) in enumerate(SWITCHES[world_size]):
        before, after = (
            ZeroShards.open(path / "deepspeed") for path in (folder / name_of(saved), tmp_path / str(number))
        )
        assert (after.zero_stage, after.world_size) == (loads.stage, world_size)
        for name in before.parameters:
            assert before.step(name) == after.step(name)
            for kind in KINDS:
                assert torch.equal(before.tensor(name, kind), after.tensor(name, kind)), (saved, loads, name, kind)
        whole = mean([of_rank[name_of(saved)] for of_rank in losses])
        tolerance = 2e-2 if saved.bf16 else 1e-6
        assert mean([of_rank[number] for of_rank in went_on]) == pytest.approx(whole, rel=tolerance), (saved, loads)


def refuse(rank: int, world_size: int, folder: Path) -> list[str]:
    dist.init()
    shards = ZeroShards.open(folder)
    engine = start(Kind(1), world_size)
    same = layout_of(engine) == ZeroShards.open(folder.parent.parent / name_of(Kind(1)) / "deepspeed").layout
    texts = [str(same)]
    engine.module.requires_grad_(False)
    del shards.layout.shapes["gain"]
    with pytest.raises(CheckpointError) as error:
        load_elastically(engine, shards)
    texts.append(str(error.value))
    engine.zero_nvme_offload_optimizer = lambda: True
    with pytest.raises(CheckpointError) as error:
        load_elastically(engine, shards)
    return [*texts, str(error.value)]


def test_what_cannot_be_taken_over(kept: tuple[Path, list[dict[str, list[float]]]]) -> None:
    folder = kept[0] / name_of(Kind(3)) / "deepspeed"
    same, other, nvme = run_ranks(refuse, SAVED_BY, folder)[0]
    assert same == "True", "an engine's own layout is the one it saves"
    assert other == (
        f"{folder} holds other parameters than this run trains:\n  gain: not saved, (1,) trained\n"
        "  fix: the recipe of the run that saved, or a new run_dir"
    )
    assert nvme.startswith(f"{folder} was saved by other ranks, which a run with its optimizer on NVMe cannot take")
