"""A row per step says what it was made of; a resumed run keeps the rows up to its cursor, of every rank."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline import dist
from pipeline.engine.observers.base import FinishedStep, Wishes
from pipeline.engine.observers.ledger import Ledger
from pipeline.engine.state import TrainState
from pipeline.errors import StorageError
from shards.load.requests import StepBatch
from shards.load.substitute import BadSample
from shards.order.items import elements_of
from shards.order.plan import Cursor


def training(run_dir: Path, rank: int = 0, world_size: int = 1, consumed: int = 0, sequence: int = 1) -> Any:
    state = TrainState(step=consumed // 4, data={"consumed": consumed})
    recipe = SimpleNamespace(train=SimpleNamespace(sequence_parallel=sequence))
    return SimpleNamespace(recipe=recipe, ranks=dist.Ranks(rank, 0, world_size), run_dir=run_dir, state=state)


def take(run: Any, ledger: Ledger, sample: int) -> None:
    """One more step of four items."""
    run.state.step += 1
    elements = elements_of(np.asarray([sample, sample + 1]), 0, np.asarray([5, 6])).tobytes()
    bad = [BadSample(sample, "shard", "key", "damaged", 77)]
    batch = StepBatch([], Cursor(1, 0, 0, run.state.step * 4), bad, 0.0, 4, elements)
    assert ledger.on_step(FinishedStep(batch, 1, 1, 0.1, {}, False), Wishes(), 0) == {}


def steps(run_dir: Path, rank: int) -> list[int]:
    lines = (run_dir / "logs" / f"ledger-rank-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_row_says_what_the_step_was_made_of(tmp_path: Path) -> None:
    run = training(tmp_path)
    ledger = Ledger(run)
    take(run, ledger, 30)
    ledger.on_end()
    assert json.loads((tmp_path / "logs" / "ledger-rank-0.jsonl").read_text()) == {
        "step": 1, "consumed": 4, "epoch": 1, "read": [[30, 0, 5], [31, 0, 6]], "replaced": [[30, 77]]
    }  # fmt: skip


def test_a_resumed_run_drops_what_it_repeats_also_of_ranks_that_are_gone(tmp_path: Path) -> None:
    for rank in range(3):
        run = training(tmp_path, rank, 3)
        ledger = Ledger(run)
        for sample in range(3):
            take(run, ledger, sample)
    run = training(tmp_path, 0, 1, consumed=8)
    ledger = Ledger(run)
    assert [steps(tmp_path, rank) for rank in range(3)] == [[1, 2]] * 3
    take(run, ledger, 9)
    assert steps(tmp_path, 0) == [1, 2, 3]


def test_rows_before_a_rollback_stay(tmp_path: Path) -> None:
    """The step goes back, the cursor does not."""
    run = training(tmp_path, consumed=40)
    run.state.step = 2  # rolled back from step 10
    (tmp_path / "logs").mkdir()
    row = json.dumps({"step": 9, "consumed": 36})
    (tmp_path / "logs" / "ledger-rank-0.jsonl").write_text(row + "\n")
    Ledger(run)
    assert steps(tmp_path, 0) == [9]


def test_ranks_that_share_packs_write_them_down_once(tmp_path: Path) -> None:
    for rank in range(4):
        run = training(tmp_path, rank, 4, sequence=2)
        take(run, Ledger(run), rank)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
        "ledger-rank-0.jsonl", "ledger-rank-2.jsonl"
    ]  # fmt: skip


def test_it_is_kept_only_if_asked_for() -> None:
    for wanted in (False, True):
        recipe: Any = SimpleNamespace(train=SimpleNamespace(sample_ledger=wanted))
        assert Ledger.enabled(recipe) is wanted


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(StorageError, match="logs could not be written"):
        Ledger(training(tmp_path))
