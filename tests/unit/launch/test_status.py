"""What a launch writes of itself, and what people read of it."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import lock, status
from launch.cli import app
from launch.lock import Holder, hold, look
from launch.output import Output
from launch.pulse import Beat, Pulses
from launch.status import Journal, last_row, rank_states, read_status
from launch.status_cli import current, describe
from launch.stop import request_stop
from pipeline.errors import ClusterError, RecipeError, StorageError

runner = CliRunner()


def beat(rank: int, step: int, heard: float, phase: str = "step", seconds: float = 1.0) -> Beat:
    return Beat(rank, f"h{rank}", 100 + rank, phase, seconds, step, 20, heard)


def test_beats_arrive_on_the_output_and_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    output = Output(None)
    doing = {"phase": "data", "seconds": 1.5, "step": 4, "total_steps": 9, "host": "a", "pid": 7}
    line = f"slt-rank-report: {json.dumps({'rank': 1, 'beat': doing})}"
    assert [output.read(text) for text in (line, f"a: {line}", f" 1: {line}", f"50 % of it {line}")] == [
        None, None, None, "50 % of it "
    ]  # fmt: skip
    last = output.pulses.last[1]
    assert (last.phase, last.step, last.host, last.pid) == ("data", 4, "a", 7)
    assert output.read('slt-rank-report: {"rank": 1, "beat": {}}') is None
    assert "a rank's report cannot be used (KeyError('step'))" in caplog.text


def test_progress_speed_and_silence() -> None:
    pulses = Pulses()
    for second, step in enumerate((10, 10, 12, 14, 16)):
        pulses.take(beat(0, step, 2.0 * second))
        pulses.take(beat(1, step - 1, 1.0))
    shown = rank_states(pulses, {0: "a", 1: "a", 2: "b"}, 10.0)
    assert (shown["step"], shown["total_steps"], shown["steps_per_second"], shown["eta_seconds"]) == (16, 20, 1.0, 4.0)
    (a, b) = shown["hosts"]
    assert a["name"] == "a" and [rank["silent_seconds"] for rank in a["ranks"]] == [2.0, 9.0]
    assert b == {"name": "b", "ranks": [{"rank": 2, "phase": None, "step": None, "silent_seconds": None}]}


def test_ranks_of_an_unknown_place_say_where_they_are() -> None:
    pulses = Pulses()
    pulses.take(beat(3, 5, 1.0))
    assert [host["name"] for host in rank_states(pulses, {}, 2.0)["hosts"]] == ["h3"]


def test_a_host_is_lost_once() -> None:
    output = Output("^srun: error: Node failure on ([^ ,]+)")
    for _ in range(2):
        output.read("srun: error: Node failure on n2")
    assert output.lost == ["n2"]


def test_the_slowest_step_counts_once_it_has_ended() -> None:
    pulses = Pulses()
    for seconds in (1.0, 30.0, 70.0):
        pulses.take(beat(0, 3, 0, seconds=seconds))
    assert pulses.slowest_step == 0.0 and not pulses.has_stepped(0) and pulses.last[0].stuck(5.0) == 75.0
    pulses.take(beat(0, 4, 0))
    assert pulses.slowest_step == 70.0 and pulses.has_stepped(0) and not pulses.has_stepped(1)
    pulses.take(beat(0, 4, 0, "data", 90.0))
    pulses.take(beat(0, 4, 0))
    assert pulses.slowest_step == 70.0, "waiting for data is not computing"


def test_a_pause_of_the_launcher_is_no_silence() -> None:
    pulses = Pulses()
    pulses.take(beat(0, 3, 10.0))
    pulses.forgive(100.0)
    assert pulses.last[0].age(112.0) == 2.0


def test_the_newest_whole_row(tmp_path: Path) -> None:
    assert last_row(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2, "train/')
    assert last_row(tmp_path) == {"step": 1}
    (tmp_path / "metrics.jsonl").write_text("3\n")
    assert last_row(tmp_path) is None


def test_a_status_that_cannot_be_written_or_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file")
    journal = Journal(tmp_path / "run", "x")
    journal.write()
    journal.write()
    assert caplog.text.count("status.json could not be written") == 1
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "status.json").write_text("{")
    with pytest.raises(StorageError, match=r"status\.json cannot be read: .*; ask where the launch runs"):
        read_status(tmp_path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """With the status of a launch in the middle of its second attempt."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 16, "train/loss": 1.25}\n')
    journal = Journal(tmp_path, "abc")
    pulses = Pulses()
    for second, step in enumerate((10, 10, 12, 14, 16)):
        pulses.take(beat(0, step, 2.0 * second))
        pulses.take(beat(1, step - 1, 1.0))
    restarts = [{"attempt": 1, "step": 8, "cause": "rank 1 was killed"}]
    journal.set(state="running", attempt=2, world_size=3, restarts=restarts)
    journal.show_ranks(lambda: rank_states(pulses, {0: "a", 1: "a", 2: "b"}, 100.0))
    journal.write()
    return tmp_path


def shown(run_dir: Path, *options: str) -> str:
    result = runner.invoke(app, ["status", str(run_dir), *options])
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_a_running_launch_shows_progress_hosts_restarts_and_metrics(run_dir: Path) -> None:
    with hold(run_dir, "abc"):
        lines = shown(run_dir).splitlines()
        assert json.loads(shown(run_dir, "--json"))["running"] is True
    assert lines == [
        "launch abc: running on 3 ranks, attempt 2",
        "  step 16 of 20, 1 steps per second, 4 s left",
        "  a: rank 0 step 16, step for 93 s, SILENT for 92 s",
        "  a: rank 1 step 15, step for 100 s, SILENT for 99 s",
        "  b: rank 2 not heard yet",
        "  attempt 1 ended at step 8: rank 1 was killed",
        "  metrics of step 16: train/loss 1.25",
    ]


def test_the_run_says_where_its_time_went(run_dir: Path) -> None:
    phases = {"start": 10.0, "step": 30.0}
    row = {"started": 0.0, "updated": 40.0, "phases": phases, "steps": 3, "undone_steps": 0, "repeated_steps": 0}
    (run_dir / "goodput.jsonl").write_text(json.dumps(row) + "\n")
    assert shown(run_dir).splitlines()[-1] == "  goodput 75.0 % of 40 s (start 25.0 %)"
    told = json.loads(shown(run_dir, "--json"))["goodput"]
    assert told["share"] == 0.75 and told["seconds"]["start"] == 10.0


def test_a_launch_that_ended_and_one_that_died(run_dir: Path) -> None:
    told = json.loads((run_dir / "logs" / "status.json").read_text())
    told["written"] -= 300
    (run_dir / "logs" / "status.json").write_text(json.dumps(told))
    assert shown(run_dir).splitlines()[0] == (
        "no launch runs here; launch abc died without a word, last heard of 5 min ago (running)"
    )
    with hold(run_dir, "abc"):
        assert "LAST HEARD OF 5 min ago: its launcher on " in shown(run_dir)
    told |= {"state": "ended", "message": "launch finished (exit code 0)", "written": time.time() - 3 * 3600}
    (run_dir / "logs" / "status.json").write_text(json.dumps(told))
    first, *rest = shown(run_dir, "--watch").splitlines()
    assert first == "no launch runs here; the last one ended 3.0 h ago: launch finished (exit code 0)"
    assert not [line for line in rest if "rank 0" in line]
    with hold(run_dir, "another"):
        assert shown(run_dir).splitlines()[0] == "launch another: starting", "the status is of an earlier launch"
    with hold(run_dir, "without launcher"):
        assert "that `slt launch run` did not start" in shown(run_dir)


def test_a_launch_that_died_before_its_first_status(run_dir: Path) -> None:
    (run_dir / "logs" / "status.json").unlink()
    with hold(run_dir, "abc"):
        lock_file = (run_dir / "launch.lock").read_bytes()
    (run_dir / "launch.lock").write_bytes(lock_file.replace(b'"pid": ', b'"pid": 1234567'))  # of no process
    os.utime(run_dir / "launch.lock", (time.time() - 300,) * 2)
    assert shown(run_dir).splitlines()[0] == (
        "no launch runs here; launch abc died without a word, last heard of 5 min ago (starting)"
    )


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is no run directory: it holds neither logs/status\.json nor"):
        current(tmp_path)


def test_a_lock_is_looked_at_without_touching_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(tmp_path) is None
    with hold(tmp_path, "abc"):
        assert look(tmp_path) == ("abc", 0.0)
        monkeypatch.setattr(lock, "_process_start", lambda pid: "")
        assert look(tmp_path) == ("abc", float("inf"))
        monkeypatch.undo()
    holder = Holder("far", 1, "now", "another system", "1", "abc")
    (tmp_path / "launch.lock").write_text(holder.key)
    found = look(tmp_path)
    assert found is not None and found[0] == "abc" and found[1] < 60


def test_stop_waits_for_the_end_and_says_how_it_was(run_dir: Path) -> None:
    """The launch is another thread here, which obeys as the supervisor does."""
    journal = Journal(run_dir, "abc")
    inside, leave = threading.Event(), threading.Event()

    def launch() -> None:
        with hold(run_dir, "abc"), journal.keeping():
            inside.set()
            while journal.request is None and not leave.is_set():
                time.sleep(0.02)
            journal.set(state="ended", message="launch stopped, saved at step 9 (exit code 75)")

    thread = threading.Thread(target=launch)
    thread.start()
    inside.wait()
    result = runner.invoke(app, ["stop", str(run_dir)])
    leave.set()
    thread.join()
    assert result.exit_code == 0, result.exception
    assert "launch stopped, saved at step 9 (exit code 75)" in result.stdout
    result = runner.invoke(app, ["stop", str(run_dir)])
    assert isinstance(result.exception, RecipeError)
    assert str(result.exception).startswith("nothing to stop: no launch runs here; the last one ended")


def test_stop_gives_up_waiting(run_dir: Path) -> None:
    with hold(run_dir, "abc"):
        result = runner.invoke(app, ["stop", str(run_dir), "--wait-seconds", "0.01"])
        assert isinstance(result.exception, ClusterError)
        assert "has not stopped within 0.01 s; look with `slt launch status`" in str(result.exception)
        result = runner.invoke(app, ["stop", str(run_dir), "--now", "--wait-seconds", "0"])
    assert result.exit_code == 0 and "was asked to stop" in result.stdout
    assert json.loads((run_dir / "stop.json").read_text())["now"] is True
    request_stop(run_dir, now=False)


def test_a_later_request_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "WRITE_SECONDS", 0.01)
    journal = Journal(tmp_path, "abc")
    with journal.keeping():
        for now in (False, True):
            request_stop(tmp_path, now=now)
            end = time.monotonic() + 10
            while journal.request is None or journal.request.now is not now:
                assert time.monotonic() < end, "--now after a stop that takes too long"
                time.sleep(0.01)


def test_describe_needs_no_metrics() -> None:
    start = {"state": "starting", "launch_id": "x", "running": True, "age_seconds": 0.0, "attempt": 1}
    assert describe(start) == ["launch x: starting, attempt 1"]
