"""What ranks tell their launcher on their own output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import notes
from launch.plan import LAUNCH_ID
from tests.source_tree import ROOT


def told(report: dict[str, object], env: dict[str, str]) -> bytes:
    program = f"from launch import notes; notes.tell({report!r})"
    env = {name: value for name, value in os.environ.items() if name != LAUNCH_ID} | env
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, check=True)
    return done.stderr


def test_a_report_arrives_whole() -> None:
    report: dict[str, object] = {"rank": 1, "code": 2, "error": "čerešňa\nwith two lines", "stopped": ""}
    line = told(report, {LAUNCH_ID: "x"}).decode()
    assert notes.read(line) == ("", report)
    assert notes.read(f"gpu7: {line}") == ("gpu7: ", report)
    assert notes.read(f"a bar without an end{line}") == ("a bar without an end", report)


def test_nobody_is_told_without_a_launcher() -> None:
    assert told({"rank": 0, "code": 0}, {}) == b""


def test_a_long_error_keeps_its_ends() -> None:
    line = told({"rank": 0, "code": 1, "error": "first " + "č" * 9000 + " last"}, {LAUNCH_ID: "x"})
    assert len(line) <= 1024
    _, report = notes.read(line.decode())
    assert report is not None and report["error"].startswith("first ") and report["error"].endswith(" last")
    assert " [...] " in report["error"]


def test_other_lines_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert notes.read("slt-rank-report is what we send") == ("slt-rank-report is what we send", None)
    assert notes.read("slt-rank-report: {torn}") == ("slt-rank-report: {torn}", None)
    assert "a rank's report cannot be read" in caplog.text


def test_a_starting_rank_leaves_at_once_and_says_that_nothing_was_lost() -> None:
    """The real rank program, in the middle of its imports."""
    env = {**os.environ, "RANK": "0", LAUNCH_ID: "x"}
    rank = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "train.py"), "demo_contrastive"],
        env=env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not _catches(rank.pid, signal.SIGTERM):
        assert rank.poll() is None
        time.sleep(0.005)
    rank.send_signal(signal.SIGTERM)
    _, errors = rank.communicate(timeout=20)
    assert rank.returncode == 75
    *beats, report, told_to_people = errors.splitlines()
    assert all(notes.read(beat)[1]["beat"]["phase"] == "start" for beat in beats), "if one was due already"
    assert notes.read(report) == ("", {"rank": 0, "code": 75, "error": "", "stopped": notes.BEFORE_FIRST_STEP})
    assert told_to_people == "SIGTERM: stopped before the first step, nothing to save"


def _catches(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(mask >> (number - 1) & 1)
