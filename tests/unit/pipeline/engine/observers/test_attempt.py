"""An attempt's row: what it holds, when it is written, and who writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import dist
from pipeline.engine.goodput import NAME, read_rows
from pipeline.engine.observers import attempt as attempts
from pipeline.engine.observers.attempt import Attempt
from pipeline.engine.observers.base import Wishes
from pipeline.engine.phases import Phases
from pipeline.engine.state import TrainState
from pipeline.errors import StorageError


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def training(run_dir: Path, clock: Clock, step: int = 0, rank: int = 0) -> Any:
    return SimpleNamespace(
        run_dir=run_dir, state=TrainState(step=step), phases=Phases(clock), ranks=dist.Ranks(rank, rank, 2),
        recipe=SimpleNamespace(name="a-run"),
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(attempts, "time", SimpleNamespace(time=lambda: clock.now + 1000, monotonic=clock))
    return clock


def test_a_row_tells_of_the_attempt(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    before = {"step": 7, "steps": 7, "started": 0.0, "updated": 900.0, "phases": {}, "undone_steps": 0}
    (tmp_path / NAME).write_text(json.dumps({**before, "repeated_steps": 0}) + "\n")
    run = training(tmp_path, clock, step=4)
    clock.now += 6
    attempt, unread = Attempt(run), Any
    attempt.on_start(Wishes())
    assert read_rows(tmp_path)[1]["phases"] == {"start": 6.0}
    run.phases.enter("step")
    for run.state.step in (5, 6):
        clock.now += 2
        attempt.on_step(unread, Wishes(), 0)
    run.state.step, run.state.undone_steps = 5, 1
    attempt.on_rollback()
    with caplog.at_level(logging.INFO):
        attempt.on_end()
    first, row = read_rows(tmp_path)
    assert first["step"] == 7, "rows of earlier attempts stay"
    assert row == {
        "started": 1050.0, "updated": 1060.0, "world_size": 2, "first_step": 4, "step": 5, "steps": 2,
        "undone_steps": 1, "repeated_steps": 3, "phases": {"start": 6.0, "step": 4.0},
    }  # fmt: skip
    assert "a-run: goodput" in caplog.text and "lost work" in caplog.text


def test_it_is_written_now_and_then(tmp_path: Path, clock: Clock) -> None:
    run, unread = training(tmp_path, clock), Any
    attempt = Attempt(run)
    attempt.on_start(Wishes())
    written = []
    for _ in range(5):
        clock.now += 0.4
        attempt.on_step(unread, Wishes(), 0)
        written.append(read_rows(tmp_path)[0]["steps"])
    assert written == [0, 0, 3, 3, 3]


def test_only_rank_0_writes(tmp_path: Path, clock: Clock) -> None:
    attempt = Attempt(training(tmp_path, clock, rank=1))
    attempt.on_start(Wishes())
    attempt.on_end()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, clock: Clock) -> None:
    attempt = Attempt(training(tmp_path / "gone" / "run", clock))
    with pytest.raises(StorageError, match=r"could not be written"):
        attempt.on_start(Wishes())
