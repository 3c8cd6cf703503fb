"""Where the time of a run went: the parts add up, and what was done for nothing is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.goodput import NAME, Goodput, read_rows, split
from pipeline.errors import StorageError


def row(started: float, step: float, first: int, steps: int, **other: Any) -> dict[str, Any]:
    """An attempt of ten seconds beside its steps."""
    phases = {"start": 6.0, "data": 1.0, "step": step, "checkpoint": 2.0, "evaluation": 1.0}
    return {
        "started": started, "updated": started + step + 10, "world_size": 2, "phases": phases, "first_step": first,
        "step": first + steps - other.get("undone_steps", 0), "steps": steps, "undone_steps": 0, "repeated_steps": 0,
        **other,
    }  # fmt: skip


def test_one_attempt() -> None:
    found = split([row(100.0, 90.0, 0, 30)])
    assert found.attempts == 1 and found.wall_seconds == 100.0 and found.goodput == 0.9
    assert found.describe() == (
        "goodput 90.0 % of 100 s (start 6.0 %, data wait 1.0 %, checkpoints 2.0 %, evaluation 1.0 %)"
    )


def test_what_was_done_again_is_lost_at_the_pace_of_its_attempt() -> None:
    """Killed at step 30, resumed 50 s later at step 20."""
    found = split([row(0.0, 90.0, 0, 30), row(150.0, 40.0, 20, 20, repeated_steps=10)])
    assert found.seconds["lost"] == pytest.approx(30.0) and found.seconds["step"] == pytest.approx(100.0)
    assert found.seconds["down"] == 50.0 and found.wall_seconds == pytest.approx(200.0)
    assert found.goodput == pytest.approx(0.5)
    assert found.describe().startswith("goodput 50.0 % of 3 min and 2 starts (start 6.0 %")
    assert found.describe().endswith("lost work 15.0 %, downtime 25.0 %)")


def test_a_rollback_loses_the_steps_it_took_back() -> None:
    found = split([row(0.0, 90.0, 0, 30, undone_steps=3)])
    assert found.seconds["lost"] == pytest.approx(9.0) and found.seconds["step"] == pytest.approx(81.0)


def test_an_attempt_may_repeat_steps_of_several() -> None:
    """A damaged checkpoint: the third attempt begins before the second."""
    rows = [row(0.0, 50.0, 0, 50), row(60.0, 5.0, 40, 5, repeated_steps=10), row(75.0, 30.0, 20, 30, repeated_steps=25)]
    found = split(rows)
    assert found.seconds["lost"] == pytest.approx(5.0 + 30.0) and found.seconds["step"] == pytest.approx(50.0)


def test_an_attempt_that_took_no_step() -> None:
    found = split([{**row(0.0, 0.0, 0, 0), "phases": {"start": 4.0}, "updated": 4.0}])
    assert found.goodput == 0.0 and found.wall_seconds == 4.0
    assert Goodput(0, split([]).seconds).describe() == "goodput 0.0 % of 0 s"


def test_rows_are_read_from_the_run_directory(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
    rows = [row(0.0, 1.0, 0, 1), row(20.0, 1.0, 1, 1)]
    (tmp_path / NAME).write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert read_rows(tmp_path) == rows
    with (tmp_path / NAME).open("a") as file:
        file.write("{half")
    with pytest.raises(StorageError, match=r"goodput\.jsonl cannot be read: .*; remove it: only this statistic begins"):
        read_rows(tmp_path)
    assert (
        split([{**rows[0], "updated": 11000.0, "phases": {"step": 10800.0}}]).describe() == "goodput 100.0 % of 3.0 h"
    )
