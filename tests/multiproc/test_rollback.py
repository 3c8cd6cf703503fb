"""A run in trouble goes back and on with other samples: to the bit the run that never saw the bad ones."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from pipeline import dist
from pipeline.engine.training import Training
from tests.jobs import World, rows
from tests.multiproc.test_health import digest_of, prepared
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

STAGE = "continued_pretraining"
SETTINGS = {
    "train__steps": 6, "data__eval": "[]", "train__checkpoint__every_steps": 2, "train__checkpoint__keep": 5,
    "train__max_skipped_steps": 2,
}  # fmt: skip
BAD = (3, 4, 5)
"""Global batches, from 1, whose loss is not finite; the checkpoint of step 4 is due amid them."""
CASES = [("fp32", 1), ("bf16", 3)]


class End(NamedTuple):
    steps: list[tuple[int, int]]
    """Step and global batch of every step that was taken."""
    state: dict[str, Any]
    digest: str


class Lost(Exception):
    """The process is gone."""


def train(sets: list[str], world_size: int, way: str, ends_at: tuple[int, str] | None = None) -> End:
    """Args: ends_at: a step behind the rollback, and whether the run stops there or is lost."""
    from pipeline.engine.observers.base import Observer
    from pipeline.engine.observers.registry import observers_of
    from pipeline.engine.sinks.registry import sinks_of
    from pipeline.engine.trainer import Trainer

    training = prepared(STAGE, sets, world_size)
    steps: list[tuple[int, int]] = []

    class Watch(Observer):
        def on_step(self, step: Any, wishes: Any, votes: int) -> dict[str, float]:
            state = self.training.state
            steps.append((state.step, batch_before(self.training)))
            if ends_at is not None and state.rollbacks and state.step == ends_at[0]:
                if ends_at[1] == "lost":
                    raise Lost
                wishes.stop = True
            return {}

    *others, save = observers_of(training)
    with contextlib.suppress(Lost), bad_batches(training) if way == "bad" else without(training):
        Trainer(training, [*others, Watch(training), save], sinks_of(training)).fit()
    digest = digest_of(training.engine)
    training.engine.destroy()
    return End(steps, training.state.to_dict(), digest)


def batch_before(training: Training) -> int:
    consumed: int = training.state.data.get("consumed", 0)
    return consumed // training.recipe.train.global_batch


@contextlib.contextmanager
def bad_batches(training: Training) -> Iterator[None]:
    stage: Any = training.stage
    loss = stage.loss

    def wounded(*args: Any) -> Any:
        parts = loss(*args)
        bad = batch_before(training) + 1 in BAD and training.ranks.rank == 0
        return replace(parts, loss=parts.loss * math.nan) if bad else parts

    with mock.patch.object(stage, "loss", wounded):
        yield


@contextlib.contextmanager
def without(training: Training) -> Iterator[None]:
    """The run whose loader has no bad batches."""
    from pipeline.engine import trainer

    original = trainer.staged

    def staged(loader: Any, device: torch.device, steps: int) -> Any:
        coming = original(loader, device, steps + len(BAD))
        first = batch_before(training) + 1
        return (batch for number, batch in enumerate(coming, first) if number not in BAD)

    with mock.patch.object(trainer, "staged", staged):
        yield


def settings(precision: str, zero: int) -> dict[str, object]:
    overrides = f"{{zero_optimization: {{stage: {zero}}}}}"
    averaging = "{kind: ema, decay: 0.5}" if zero == 3 else "{}"
    return {**SETTINGS, "train__precision": precision, "deepspeed__overrides": overrides, "train__averaging": averaging}


def train_all(rank: int, world_size: int, jobs: list[dict[str, list[str]]]) -> list[dict[str, End]]:
    dist.init()
    found = []
    for job in jobs:
        ends = {
            "without": train(job["without"], world_size, "without"),
            "bad": train(job["bad"], world_size, "bad"),
            "stopped": train(job["stopped"], world_size, "bad", (4, "stopped")),
            "lost": train(job["lost"], world_size, "bad", (3, "lost")),
        }
        ends |= {f"{name} on": train(job[name], world_size, "bad") for name in ("stopped", "lost")}
        found.append(ends)
    return found


@pytest.fixture(scope="module")
def ends(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, dict[str, End]]]:
    jobs, folders = [], []
    for case in CASES:
        folders.append(tmp_path_factory.mktemp("rollback"))
        names = ("without", "bad", "stopped", "lost")
        jobs.append({name: world.sets(STAGE, folders[-1] / name, 2, **settings(*case)) for name in names})
    zeroth, first = run_ranks(train_all, 2, jobs, timeout=300)
    for mine, other in zip(zeroth, first, strict=True):
        assert {name: end.state for name, end in mine.items()} == {name: end.state for name, end in other.items()}
    return dict(zip(CASES, zip(folders, zeroth, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_back_to_the_last_good_checkpoint_and_on_with_other_samples(
    case: tuple[str, int], ends: dict[tuple[str, int], tuple[Path, dict[str, End]]]
) -> None:
    folder, of_run = ends[case]
    assert of_run["without"].steps == [(1, 1), (2, 2), (3, 6), (4, 7), (5, 8), (6, 9)]
    assert of_run["bad"].steps == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (3, 6), (4, 7), (5, 8), (6, 9)]
    assert of_run["bad"].digest == of_run["without"].digest
    state = of_run["bad"].state
    assert [state[name] for name in ("rollbacks", "undone_steps", "skipped_total", "skipped_steps")] == [1, 3, 3, 0]
    assert state["running_means"] == of_run["without"].state["running_means"]
    assert rows(folder / "bad") == rows(folder / "without"), "a curve has one value per step"
    lines = [json.loads(line) for line in (folder / "bad" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("how", ["stopped", "lost"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_that_ends_behind_its_rollback_resumes_bit_equal(
    case: tuple[str, int], how: str, ends: dict[tuple[str, int], tuple[Path, dict[str, End]]]
) -> None:
    """Stopped, it goes on where it was; lost before its next checkpoint, it meets the bad samples again, and goes back
    again."""
    folder, of_run = ends[case]
    again = [(5, 8), (6, 9)] if how == "stopped" else of_run["bad"].steps[2:]
    assert of_run[f"{how} on"].steps == again
    assert of_run[f"{how} on"].state == of_run["bad"].state and of_run[f"{how} on"].digest == of_run["bad"].digest
    assert rows(folder / how) == rows(folder / "bad")


def train_alone(rank: int, world_size: int, jobs: list[dict[str, list[str]]]) -> list[dict[str, End]]:
    dist.init()
    return [{way: train(sets, world_size, way) for way, sets in job.items()} for job in jobs]


def test_back_to_a_checkpoint_of_another_world_size(
    ends: dict[tuple[str, int], tuple[Path, dict[str, End]]], world: World, tmp_path: Path
) -> None:
    """One rank goes on where two saved, and meets the bad samples before it has saved anything itself."""
    jobs = []
    for case, (folder, _) in ends.items():
        run_dirs = {way: tmp_path / f"{case[0]}-{way}" for way in ("without", "bad")}
        for run_dir in run_dirs.values():
            saved = Path("checkpoints") / "step-000002"
            shutil.copytree(folder / "bad" / saved, run_dir / saved)
        jobs.append({way: world.sets(STAGE, run_dir, 1, **settings(*case)) for way, run_dir in run_dirs.items()})
    (alone,) = run_ranks(train_alone, 1, jobs, timeout=180)
    for of_run in alone:
        assert of_run["without"].steps == [(3, 6), (4, 7), (5, 8), (6, 9)]
        assert of_run["bad"].steps == [(3, 3), (4, 4), (5, 5), *of_run["without"].steps]
        assert of_run["bad"].digest == of_run["without"].digest
