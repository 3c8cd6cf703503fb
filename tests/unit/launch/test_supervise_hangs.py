"""Supervision by heartbeats: here a script says them for ranks that do not exist."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from launch.backends import Command
from launch.hang import Limits
from launch.processes import Patience
from launch.status import Journal
from launch.stop import StopRequest
from launch.supervise import Watch, supervise
from launch.verdict import Outcome

QUICK = Patience(grace_seconds=0.3, failure_seconds=0.3, leftover_seconds=0.1)


def run(folder: Path, pids: tuple[int, int], watch: Watch) -> Outcome:
    """Two ranks beat once, in step 5, and are not heard again."""
    doing = {"phase": "step", "seconds": 1.0, "step": 5, "total_steps": 9, "host": "h"}
    beats = [{"rank": rank, "beat": {**doing, "pid": pid}} for rank, pid in enumerate(pids)]
    told = "\\n".join(f"slt-rank-report: {json.dumps(beat)}" for beat in beats)
    script = f"import time\nprint({told!r}.replace('\\\\n', chr(10)), flush=True)\ntime.sleep(60)"
    return supervise(Command(argv=(sys.executable, "-c", script)), folder, ("nobody", 2), QUICK, watch)


@pytest.fixture
def alive() -> tuple[int, int]:
    me = int(Path("/proc/self").resolve().name)
    return me, me


def test_silent_ranks_end_the_launch(tmp_path: Path, alive: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    begin = time.monotonic()
    outcome = run(tmp_path, alive, Watch(limits=Limits(0.5)))
    assert outcome.code == 3 and time.monotonic() - begin < 20
    assert outcome.cause is not None and outcome.cause.hang and outcome.cause.ranks == (0, 1)
    assert outcome.step == 5 and "rank 0,1: silent for" in caplog.text
    assert "slt-rank-report" not in (tmp_path / "logs" / "launch.log").read_text()


def test_a_rank_that_dies_is_seen_at_once_and_first(tmp_path: Path, alive: tuple[int, int]) -> None:
    """Also where its launcher does not stop the others."""
    begin = time.monotonic()
    outcome = run(tmp_path, (alive[0], 2**22 - 1), Watch())
    assert outcome.code == 137 and time.monotonic() - begin < 20
    assert outcome.cause is not None and outcome.cause.ranks == (1,) and outcome.consequences == {0}


@pytest.mark.parametrize("now", [False, True])
def test_a_request_to_stop(tmp_path: Path, alive: tuple[int, int], now: bool, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path, "nobody")
    journal.request = StopRequest(now, "me on h")
    outcome = run(tmp_path, alive, Watch(journal))
    assert outcome.signals == (15,), "so that nobody restarts it"
    assert f"stop requested by me on h{', without saving' if now else ''}" in caplog.text
    assert ("passed on to the ranks" in caplog.text) is not now
