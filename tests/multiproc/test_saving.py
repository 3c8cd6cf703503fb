"""Checkpoints written beside the training, on real DeepSpeed: the same bytes, whatever happens meanwhile."""

from __future__ import annotations

import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import dist
from pipeline.engine.checkpoint import TAG, list_checkpoints, verify
from pipeline.errors import EXIT_CLUSTER, EXIT_PREEMPTED, EXIT_USER
from tests.jobs import TINY_VISUAL, World, finish, rows, run_job, start_ranks
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

STAGES = ("continued_pretraining", "contrastive", "connector")
SETTINGS = {"train__steps": 9, "train__precision": "bf16", "data__eval": "[]"}
ZERO = "{{zero_optimization: {{stage: {0}}}}}"
FROZEN = {"contrastive": {"model__visual": TINY_VISUAL.replace("train: full", "train: frozen")}}
Parts = dict[str, dict[str, Any]]


@dataclass
class Saved:
    """Of one run: what was saved at the same moments in both ways."""

    at_once: list[Parts]
    background: list[Parts]
    trained: int
    """Numbers that train."""
    frozen: list[str]
    """Names of weights that do not train, all names of tied ones."""
    held: list[str]
    """Names of the weights in the last checkpoint."""
    stored_bytes: int
    """Of tensors, in the ZeRO shards of the last checkpoint."""


def save_both_ways(rank: int, world_size: int, jobs: list[tuple[str, list[str]]]) -> list[Saved]:
    dist.init()
    return [_save_both_ways(stage, sets, world_size) for stage, sets in jobs]


def _save_both_ways(stage: str, sets: list[str], world_size: int) -> Saved:
    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve
    from pipeline.engine.agreement import agree
    from pipeline.engine.phases import Phases
    from pipeline.engine.prepare import prepare
    from pipeline.engine.saving.save import Saver
    from pipeline.engine.signals import StopFlag
    from pipeline.engine.trainer import Trainer
    from pipeline.stages.registry import stage_class

    resolved = resolve(load_recipe(f"demo_{stage}", sets), world_size)
    run_dir = Path(resolved.recipe.run_dir)
    ranks, device = dist.ranks_from_environment(), torch.device("cpu")
    training = prepare(resolved, stage_class(stage), ranks, device, StopFlag(), Phases())
    trainer, batches = Trainer(training, [], []), iter(training.loader)

    def step() -> None:
        batch = next(batches)
        trainer._step(batch, list(batch.micro_batches), agree(training, batch, []))

    def parts() -> Parts:
        found: Parts = list_checkpoints(run_dir)[-1].manifest["parts"]
        return found

    saver, at_once, background = Saver(training), [], []
    step()
    for _ in range(2):  # the second snapshot is copied over the first
        saver.background = False
        saver.begin(best=False)
        at_once.append(parts())
        saver.background, go_on = True, threading.Event()
        saver._pool.submit(go_on.wait)  # nothing is written before the next step is done
        saver.begin(best=False)
        step()
        go_on.set()
        saver.finish()
        background.append(parts())
    module, shards = training.engine.module, list_checkpoints(run_dir)[-1].path / TAG
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
    states = [torch.load(file, weights_only=False) for file in shards.glob("*.pt")]
    held = [name for state in states for name in state.get("module", {})]
    training.engine.destroy()
    frozen = [name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]
    return Saved(at_once, background, trained, frozen, held, sum(map(stored_bytes, states)))


def stored_bytes(tree: Any) -> int:
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            walk(inner)

    walk(tree)
    return sum(storages.values())


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Saved]:
    folder = tmp_path_factory.mktemp("saved")
    runs = [(stage, zero) for stage in STAGES for zero in (0, 1, 2, 3)]
    jobs = []
    for stage, zero in runs:
        settings = {**SETTINGS, **FROZEN.get(stage, {}), "deepspeed__overrides": ZERO.format(zero)}
        jobs.append((stage, world.sets(stage, folder / f"{stage}-{zero}", 2, **settings)))
    return dict(zip(runs, run_ranks(save_both_ways, 2, jobs, timeout=400)[0], strict=True))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_a_background_checkpoint_has_the_bytes_of_a_synchronous_one(
    stage: str, zero: int, saved: dict[tuple[str, int], Saved]
) -> None:
    """Every part of it, though a step was taken between the snapshot and the write."""
    run = saved[stage, zero]
    assert run.background == run.at_once
    first, second = ({name: part["sha256"] for name, part in parts.items()} for parts in run.at_once)
    changed = {name.partition("/")[0] for name in first if first[name] != second[name]}
    assert changed >= {"deepspeed", "probe.safetensors", "state.json"} and "hf" not in changed


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_are_not_written(stage: str, zero: int, saved: dict[tuple[str, int], Saved]) -> None:
    """Not even a tied head under its second name. The others: bf16, or an empty placeholder under ZeRO-3, fp32 and both
    moments."""
    run = saved[stage, zero]
    assert bool(run.frozen) == (stage != "continued_pretraining"), "there, every weight trains"
    assert not set(run.held) & set(run.frozen)
    assert run.stored_bytes == pytest.approx(run.trained * (12 if zero == 3 else 14), rel=0.01)


FAULTY = {"train__steps": 6, "train__checkpoint__every_steps": 2, "train__checkpoint__keep": 9}


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run that the faults meet."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    run_job(STAGES[0], world.sets(STAGES[0], run_dir, 2, **FAULTY), 2)
    return rows(run_dir)


def run_into(fault: str, sets: list[str]) -> tuple[list[int], str]:
    """A run of two ranks that meets the fault on rank 1 while the checkpoint of step 4 is written."""
    ranks = start_ranks(STAGES[0], sets, 2, {"SLT_TEST_FAULT": fault}, script="tests/multiproc/fault_while_saving.py")
    return finish(ranks)


def saved_steps(run_dir: Path) -> list[int]:
    return [found.step for found in list_checkpoints(run_dir) if not verify(found)]


def unfinished(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").glob(".tmp-*")]


def test_sigterm_during_a_write_completes_it_and_saves_again(
    world: World, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    sets = world.sets(STAGES[0], tmp_path, 2, **{**FAULTY, "train__steps": 500})
    codes, output = run_into("SIGTERM", sets)
    assert codes == [EXIT_PREEMPTED] * 2, output[-3000:]
    *before, last = saved_steps(tmp_path)
    assert before[:2] == [2, 4] and last >= 5 and f"saved at step {last} of 500" in output
    assert not unfinished(tmp_path)
    waited = re.search(r"checkpoint step 4 complete: stalled (\S+) s", output)
    assert waited and float(waited[1]) > 0.1, "the stop waited for it"
    assert "checkpoint/stall_seconds" in (tmp_path / "metrics.jsonl").read_text()


def test_kill_during_a_write_leaves_what_the_next_start_removes(
    world: World, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    sets = world.sets(STAGES[0], tmp_path, 2, **FAULTY)
    codes, output = run_into("kill", sets)
    assert codes == [EXIT_CLUSTER, -signal.SIGKILL], output[-3000:]
    assert saved_steps(tmp_path) == [2] and unfinished(tmp_path) == [".tmp-step-000004"]
    assert "step-000002 at step 2" in run_job(STAGES[0], sets, 2)
    assert saved_steps(tmp_path) == [2, 4, 6] and not unfinished(tmp_path)
    assert rows(tmp_path) == undisturbed, "to the last bit"


def test_full_disk_during_a_write_is_one_error_on_every_rank(
    world: World, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    sets = world.sets(STAGES[0], tmp_path, 2, **FAULTY)
    codes, output = run_into("full disk", sets)
    assert codes == [EXIT_USER] * 2, output[-3000:]
    message = r"error \(rank {}\): checkpoint \S+step-000004 could not be written: while writing the ZeRO shards"
    assert all(re.search(message.format(rank), output) for rank in (0, 1)), output[-3000:]
    assert saved_steps(tmp_path) == [2] and not unfinished(tmp_path)
    run_job(STAGES[0], sets, 2)
    assert rows(tmp_path) == undisturbed, "to the last bit"
