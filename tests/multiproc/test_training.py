"""The numbers that must be right, on real DeepSpeed processes: resume, world size, loss, preemption, failures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.engine.checkpoint import TAG, Checkpoint, latest_checkpoint, list_checkpoints
from pipeline.engine.saving.mean import mean_of_last
from pipeline.engine.zero_shards import AVERAGE, ZeroShards
from pipeline.errors import EXIT_DAMAGED, EXIT_DATA, EXIT_DIVERGED, EXIT_PREEMPTED, EXIT_USER
from pipeline.export.hf import export
from pipeline.inference.extract_features import extract
from shards.build.features import FeatureOptions
from shards.format.index import read_index
from tests.jobs import World, finish, rows, run_job, start_ranks, wait_for

pytestmark = pytest.mark.multiproc

STAGES = ("continued_pretraining", "contrastive", "connector")
SETTINGS = {"train__steps": 6, "train__checkpoint__every_steps": 3, "train__checkpoint__keep": 5}
AVERAGED: dict[str, dict[str, object]] = {"contrastive": {"train__averaging": "{kind: ema, decay: 0.5}"}}
"""By stage: the runs of the others keep no mean of the weights."""
METRICS = {"continued_pretraining": "eval/loss", "contrastive": "eval/video_to_text/r1", "connector": "eval/bleu4"}
TO_ROUNDING = 3e-4
"""fp32 sums in another order: what another world size or micro-batch may change."""

STAGE_0 = "{zero_optimization: {stage: 0}}"
OTHERWISE: dict[str, dict[str, object]] = {
    "continued_pretraining": {"deepspeed__base": "zero1"}, "contrastive": {"deepspeed__overrides": STAGE_0},
    "connector": {},
}  # fmt: skip
"""How the run that goes on at another world size shards; the others use ZeRO-3."""

Runs = Callable[[str], Path]


@pytest.fixture(scope="session")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Six uninterrupted steps of a stage on two ranks."""

    @cache
    def run(stage: str) -> Path:
        run_dir = tmp_path_factory.mktemp("whole") / stage
        run_job(stage, world.sets(stage, run_dir, 2, **settings_of(stage)), 2)
        return run_dir

    return run


@pytest.fixture(scope="session")
def killed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same run, killed with -9 after its checkpoint of step 3."""

    @cache
    def run(stage: str) -> Path:
        run_dir = tmp_path_factory.mktemp("killed") / stage
        ranks = start_ranks(stage, world.sets(stage, run_dir, 2, **settings_of(stage)), 2)
        wait_for(lambda: (run_dir / "checkpoints" / "step-000003" / "COMPLETE").is_file(), ranks)
        for rank in ranks:
            os.killpg(rank.pid, signal.SIGKILL)
        codes, _ = finish(ranks)
        assert codes == [-signal.SIGKILL] * 2
        for later in (run_dir / "checkpoints").glob("*step-000006"):
            shutil.rmtree(later)  # should the kill have come late
        return run_dir

    return run


@dataclass(frozen=True)
class Alone:
    """Run folders of two jobs of one rank."""

    big: Path
    """The whole global batch as one micro-batch."""
    resumed: Path
    """The killed run of two ranks, continued under another ZeRO stage (see `OTHERWISE`)."""


@pytest.fixture(scope="session")
def alone(world: World, killed: Runs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Alone]:
    """A rank is one thread, so two jobs of one rank run side by side."""

    @cache
    def run(stage: str) -> Alone:
        folder = tmp_path_factory.mktemp("alone")
        made = Alone(folder / "big", folder / "resumed")
        shutil.copytree(killed(stage), made.resumed)
        big = {"train__micro_batch": 8, "train__peak_tflops": 1.0}
        jobs = [
            start_ranks(stage, world.sets(stage, made.big, 1, **settings_of(stage), **big), 1),
            start_ranks(stage, world.sets(stage, made.resumed, 1, **settings_of(stage), **OTHERWISE[stage]), 1),
        ]
        for codes, output in [finish(job) for job in jobs]:
            assert codes == [0], output[-6000:]
        return made

    return run


def settings_of(stage: str) -> dict[str, object]:
    return {**SETTINGS, **AVERAGED.get(stage, {})}


def newest(run_dir: Path) -> Checkpoint:
    found = latest_checkpoint(run_dir)
    assert found is not None
    return found


def weights(run_dir: Path) -> dict[str, str]:
    """sha256 of every trained tensor, its moments and the random numbers of the newest checkpoint."""
    checkpoint = newest(run_dir)
    shards = ZeroShards.open(checkpoint.path / TAG)
    digests = {
        f"{name} {kind}": hashlib.sha256(shards.tensor(name, kind).numpy().tobytes()).hexdigest()
        for name in shards.parameters
        for kind in shards.kinds
    }
    parts = checkpoint.manifest["parts"]
    return digests | {name: parts[name]["sha256"] for name in parts if name.startswith("rng-")}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_resumes_bit_equal(stage: str, world: World, whole: Runs, killed: Runs, tmp_path: Path) -> None:
    """6 steps == 3 steps + kill -9 + resume + 3 steps: losses, weights and random numbers to the last bit."""
    run_dir = tmp_path / "resumed"
    shutil.copytree(killed(stage), run_dir)
    output = run_job(stage, world.sets(stage, run_dir, 2, **settings_of(stage)), 2)
    assert "step-000003 at step 3" in output
    assert sorted(rows(run_dir)) == [1, 2, 3, 4, 5, 6]
    assert rows(run_dir) == rows(whole(stage))
    assert weights(run_dir) == weights(whole(stage))
    assert newest(run_dir).state().data == newest(whole(stage)).state().data


@pytest.mark.parametrize("stage", STAGES)
def test_one_big_batch_is_the_oracle(stage: str, whole: Runs, alone: Callable[[str], Alone]) -> None:
    """One process with the whole global batch as one micro-batch gives the losses and gradient norms of two ranks
    with accumulation: the loss is normalised over the global batch, and negatives span it."""
    run_dir, two = alone(stage).big, whole(stage)
    if stage == "continued_pretraining":  # the peak above is made up; only that the utilisation is derived from it
        assert all(0 < value < 1 for value in rows(run_dir, "perf/mfu").values())
        assert len(rows(run_dir, "perf/mfu")) == 6
    assert rows(run_dir) == pytest.approx(rows(two), rel=TO_ROUNDING)
    assert rows(run_dir, "train/grad_norm") == pytest.approx(rows(two, "train/grad_norm"), rel=10 * TO_ROUNDING)
    one_state, two_state = newest(run_dir).state(), newest(two).state()
    assert one_state.data == two_state.data
    assert (one_state.tokens_seen, one_state.samples_seen) == (two_state.tokens_seen, two_state.samples_seen)
    assert one_state.tokens_seen > 0


@pytest.mark.parametrize("stage", STAGES)
def test_resume_at_another_world_size_and_zero_stage(stage: str, whole: Runs, alone: Callable[[str], Alone]) -> None:
    """Two ranks, killed, continued on one: the same samples in the same order, losses equal to rounding."""
    run_dir = alone(stage).resumed
    assert rows(run_dir) == pytest.approx(rows(whole(stage)), rel=TO_ROUNDING)
    assert newest(run_dir).world_size == 1
    assert newest(run_dir).state().data == newest(whole(stage)).state().data


def test_an_export_holds_the_mean_of_the_weights(whole: Runs, tmp_path: Path) -> None:
    """As the live model computed with it when it was saved; and `slt ckpt average` averages these means."""
    run_dir = whole("contrastive")
    assert max(export(run_dir, tmp_path / "export", which="latest").values()) < 1e-4
    name, found = "visual.word_norm.bias", load_file(tmp_path / "export" / "model.safetensors")
    of_steps = [ZeroShards.open(checkpoint.path / TAG) for checkpoint in list_checkpoints(run_dir)]
    means = [shards.tensor(name, AVERAGE) for shards in of_steps]
    assert torch.equal(found["word_norm.bias"], means[-1]) and not torch.equal(means[-1], of_steps[-1].tensor(name))
    mean_of_last(run_dir, 2, tmp_path / "mean")
    export(tmp_path / "mean", tmp_path / "averaged", check=False)
    averaged = load_file(tmp_path / "averaged" / "model.safetensors")
    assert torch.allclose(averaged["word_norm.bias"], (means[0] + means[1]) / 2) and averaged.keys() == found.keys()


def test_filled_items_train_alike_at_any_world_size_and_resume_bit_equal(world: World, tmp_path: Path) -> None:
    """The connector stage with `pack_tokens`: items hold unequal numbers of clips, and the loss does not notice."""
    packing = {**SETTINGS, "data__pack_tokens": 100, "train__global_batch": 4, "train__micro_batch": 1}
    sets = {name: world.sets("connector", tmp_path / name, 2, **packing) for name in ("two", "resumed")}
    run_job("connector", sets["two"], 2)
    big = world.sets("connector", tmp_path / "one", 1, **{**packing, "train__micro_batch": 4})
    run_job("connector", big, 1)
    assert rows(tmp_path / "one") == pytest.approx(rows(tmp_path / "two"), rel=TO_ROUNDING)
    states = [newest(tmp_path / name).state() for name in ("one", "two")]
    assert states[0].data == states[1].data and states[0].samples_seen == states[1].samples_seen > 6 * 4
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000006")
    assert "step-000003 at step 3" in run_job("connector", sets["resumed"], 2)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "two")
    assert weights(tmp_path / "resumed") == weights(tmp_path / "two")


def test_sigterm_saves_and_exits_75(world: World, tmp_path: Path) -> None:
    """One signalled rank is enough: all ranks agree, save at the step boundary, exit 75; the next start continues."""
    run_dir, stage = tmp_path / "run", "continued_pretraining"
    ranks = start_ranks(stage, world.sets(stage, run_dir, 2, train__steps=500), 2)
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file() and len(rows(run_dir)) >= 3, ranks)
    os.kill(ranks[1].pid, signal.SIGTERM)
    codes, output = finish(ranks)
    assert codes == [EXIT_PREEMPTED] * 2, output[-3000:]
    (saved,) = list_checkpoints(run_dir)
    assert saved.step == max(rows(run_dir)) >= 3
    notes = [json.loads((run_dir / "logs" / f"exit-rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [note["code"] for note in notes] == [EXIT_PREEMPTED] * 2
    assert {note["stopped"] for note in notes} == {f"saved at step {saved.step}"}
    assert f"stopped, saved at step {saved.step} of 500" in output
    assert not (run_dir / "launch.lock").exists()


@pytest.mark.parametrize("stage", ["connector"])
def test_a_stopped_evaluation_is_done_again_bit_equal(stage: str, world: World, tmp_path: Path) -> None:
    """SIGTERM stops a held-out evaluation at its next batch; the run saves, and its curves are those of one piece."""
    settings = {**SETTINGS, "train__eval_every_steps": 2, "train__steps": 4, "train__micro_batch": 1}
    runs = {name: world.sets(stage, tmp_path / name, 2, **settings) for name in ("whole", "stopped")}
    run_job(stage, runs["whole"], 2)
    codes, output = finish(start_ranks(stage, runs["stopped"], 2, script="tests/multiproc/stopped_rank.py"))
    assert codes == [EXIT_PREEMPTED] * 2, output[-3000:]
    assert "step 2  held-out: stopped; done again when resumed" in output and "saved at step 2 of 4" in output
    assert newest(tmp_path / "stopped").state().evaluation_due
    run_job(stage, runs["stopped"], 2)
    metric = METRICS[stage]
    assert sorted(rows(tmp_path / "stopped", metric)) == [0, 2, 4]
    for name in (metric, "train/loss"):
        assert rows(tmp_path / "stopped", name) == rows(tmp_path / "whole", name)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert not newest(tmp_path / "stopped").state().evaluation_due
    assert newest(tmp_path / "stopped").state().best == newest(tmp_path / "whole").state().best


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(world: World, killed: Runs, tmp_path: Path) -> None:
    """A flipped byte in a ZeRO shard, which torch would load silently, is found by all ranks together."""
    run_dir, stage = tmp_path / "run", "continued_pretraining"
    shutil.copytree(killed(stage), run_dir)
    intact, newest_one = (run_dir / "checkpoints" / f"step-00000{step}" for step in (3, 4))
    shutil.copytree(intact, newest_one)
    shard = next((newest_one / TAG).glob("*rank_1*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    sets = world.sets(stage, run_dir, 2, **SETTINGS)
    codes, output = finish(start_ranks(stage, [*sets, "train.checkpoint.damaged=stop"], 2))
    assert codes == [EXIT_DAMAGED] * 2, output[-3000:]
    assert f"{shard.name} is damaged: its sha256 differs" in output
    output = run_job(stage, sets, 2)
    assert output.count(f"FALLING BACK to {intact}") == 1 and f"resumed {intact} at step 3" in output
    assert (run_dir / "checkpoints" / "damaged-step-000004").is_dir() and newest(run_dir).step == 6


@pytest.fixture(scope="module")
def failing(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], str]]:
    """Exit codes and output of two jobs of one rank that must fail, side by side."""
    settings: dict[str, dict[str, object]] = {
        "divergence": {"train__steps": 40, "train__optimizer__lr": "1.0e+30", "train__max_skipped_steps": 2},
        "require": {"train__steps": 2, "train__checkpoint__resume": "require"},
    }
    stage = "continued_pretraining"
    jobs = {
        name: start_ranks(stage, world.sets(stage, tmp_path_factory.mktemp(name), 1, **values), 1)
        for name, values in settings.items()
    }
    return {name: finish(job) for name, job in jobs.items()}


def test_divergence_stops_the_run(failing: dict[str, tuple[list[int], str]]) -> None:
    codes, output = failing["divergence"]
    assert codes == [EXIT_DIVERGED], output[-3000:]
    assert "gradients were not finite in 3 consecutive steps" in output


def test_required_checkpoint_missing(failing: dict[str, tuple[list[int], str]]) -> None:
    codes, output = failing["require"]
    assert codes == [EXIT_USER]
    assert "`require` but" in output and "Traceback" not in output


def test_damaged_samples_are_replaced_on_every_rank_alike_and_too_many_stop_the_run(
    world: World, tmp_path: Path
) -> None:
    """Two clips with flipped bytes: named, counted once each however often they come up, and no rank ever waits for
    another; a budget of one ends the run with the data error's code."""
    shards = tmp_path / "shards"
    shutil.copytree(world.video, shards)
    index = read_index(shards)
    damaged = [row for row in index.rows() if row.split == "train"][:2]
    for row in damaged:
        with (shards / row.shard).open("r+b") as tar:
            tar.seek(row.offset + row.size // 2)
            tar.write(b"\x00damaged\x00")
    stage = "contrastive"
    source = {"data__train": f"[{{shards: {shards}}}]", "train__steps": 14}  # two epochs and more
    run_dir = tmp_path / "run"
    output = run_job(stage, world.sets(stage, run_dir, 2, **source), 2)
    assert rows(run_dir, "data/bad_samples")[14] == 2
    log = output + "".join(path.read_text() for path in (run_dir / "logs").glob("rank-*.log"))
    for row in damaged:
        assert f"{row.shard}:{row.key}" in log and "do not match the CRC-32" in log
    sets = world.sets(stage, tmp_path / "strict", 2, **source, data__max_bad_samples=1)
    codes, output = finish(start_ranks(stage, sets, 2))
    assert EXIT_DATA in codes, output[-3000:]
    assert "damaged samples, more than" in output and "slt shards lint" in output


def test_stored_features_train_like_their_frames(world: World, whole: Runs, tmp_path: Path) -> None:
    """The same steps on features of the frozen backbone: the losses differ by what float16 rounds away."""
    sets = world.sets("connector", tmp_path / "run", 2, **SETTINGS)
    extract("demo_connector", sets, world.video, tmp_path / "features", FeatureOptions())
    run_job("connector", [*sets, f"data.train=[{{shards: {tmp_path / 'features'}}}]"], 2)
    on_features, on_frames = rows(tmp_path / "run"), rows(whole("connector"))
    assert on_features.keys() == on_frames.keys()
    assert [on_features[step] for step in sorted(on_features)] == pytest.approx(
        [on_frames[step] for step in sorted(on_frames)], rel=5e-3
    )
