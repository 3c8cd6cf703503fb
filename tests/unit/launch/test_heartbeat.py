"""What a rank tells while it works, and the request it obeys where no launcher listens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import heartbeat, notes
from launch.heartbeat import Heartbeat
from launch.stop import forget_request, read_request, request_stop
from pipeline.engine.phases import Phases
from pipeline.errors import StorageError
from tests.source_tree import ROOT


def test_a_beat_says_what_the_rank_is_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, object]] = []
    monkeypatch.setattr(heartbeat, "tell", told.append)
    monkeypatch.setattr(heartbeat, "PERIOD_SECONDS", 0.01)
    monkeypatch.setenv("RANK", "3")
    phases = Phases()
    phases.step, phases.total_steps = 7, 9
    with Heartbeat(phases):
        phases.enter("data")
        while len(told) < 4:
            time.sleep(0.005)
    assert told[-1]["rank"] == 3
    beat = told[-1]["beat"]
    assert isinstance(beat, dict)
    assert (beat["phase"], beat["step"], beat["total_steps"], beat["pid"]) == ("data", 7, 9, os.getpid())
    ended = len(told)
    time.sleep(0.05)
    assert len(told) == ended, "no beat after the end"


def rank_that_waits(run_dir: Path, then: str = "pass") -> subprocess.Popen[str]:
    program = (
        "import pathlib, sys, time; from launch import heartbeat; from pipeline.engine.phases import Phases\n"
        "from pipeline.engine.signals import StopFlag\n"
        "heartbeat.PERIOD_SECONDS = 0.02\n"
        "with StopFlag() as stop, heartbeat.Heartbeat(Phases()) as beat:\n"
        "    beat.obey_requests_in(pathlib.Path(sys.argv[1])); print('ready', flush=True)\n"
        "    while not stop.requested: time.sleep(0.01)\n"
        f"    {then}\n"
    )
    env = {name: value for name, value in os.environ.items() if name != notes.LAUNCH_ID}
    argv = [sys.executable, "-c", program, str(run_dir)]
    rank = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    return rank


def test_a_rank_without_launcher_obeys_a_request(tmp_path: Path) -> None:
    rank = rank_that_waits(tmp_path)
    request_stop(tmp_path, now=False)
    _, errors = rank.communicate(timeout=20)
    assert rank.returncode == 0 and errors == "", "it set the flag, and told nobody of its beats"
    rank = rank_that_waits(tmp_path)
    request_stop(tmp_path, now=True)
    rank.communicate(timeout=20)
    assert rank.returncode == 130


def test_a_rank_that_saves_too_long_obeys_a_more_urgent_request(tmp_path: Path) -> None:
    rank = rank_that_waits(tmp_path, "while True: time.sleep(0.01)")
    request_stop(tmp_path, now=False)
    time.sleep(0.2)
    assert rank.poll() is None
    request_stop(tmp_path, now=True)
    rank.communicate(timeout=20)
    assert rank.returncode == 130


def test_a_rank_whose_launcher_is_gone_ends_when_it_does_not_advance() -> None:
    program = (
        "import time; from launch import heartbeat; from pipeline.engine.phases import Phases\n"
        "heartbeat.PERIOD_SECONDS = 0.02\n"
        "with heartbeat.Heartbeat(phases := Phases()):\n"
        "    for _ in range(40): time.sleep(0.01); phases.enter('step')\n"
        "    print('advanced', flush=True); time.sleep(60)\n"
    )
    env = {**os.environ, notes.LAUNCH_ID: "x", heartbeat.ABANDONED: "0.2"}
    argv = [sys.executable, "-c", program]
    rank = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout is not None and rank.stderr is not None
    assert "slt-rank-report" in rank.stderr.readline()
    rank.stderr.close()  # as a launcher that is gone
    assert rank.stdout.read() == "advanced\n" and rank.wait(timeout=20) == 3


def test_a_request_waits_until_it_is_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_request(tmp_path) is None
    request_stop(tmp_path, now=True)
    found = read_request(tmp_path)
    assert found is not None and found.now and " on " in found.who
    forget_request(tmp_path)
    assert read_request(tmp_path) is None
    forget_request(tmp_path)
    (tmp_path / "stop.json").write_text(json.dumps([]))
    assert read_request(tmp_path) is None and "nothing is stopped" in caplog.text


def test_a_request_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match=r"stop\.json could not be written: Not a directory; free space, or stop"):
        request_stop(tmp_path / "run", now=False)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
