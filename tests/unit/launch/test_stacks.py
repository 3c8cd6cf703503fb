"""What the ranks of a host are doing, read from outside or written by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import stacks
from launch.plan import LAUNCH_ID
from launch.stacks import drop_empty, innermost, main, save_stacks, stacks_file, write_on_signal
from tests.source_tree import ROOT

PROGRAM = """
import pathlib, sys, time
from launch.stacks import write_on_signal
def wait_for_ever():
    print("ready", flush=True)
    time.sleep(60)
with write_on_signal(pathlib.Path(sys.argv[1]), 1):
    wait_for_ever()
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    launch_id = uuid.uuid4().hex
    env = {**os.environ, LAUNCH_ID: launch_id, "RANK": "1"}
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process, launch_id
    process.kill()
    process.wait()


@pytest.mark.parametrize("stopped", [False, True])
def test_read_from_outside_also_of_a_stopped_process(
    rank: tuple[subprocess.Popen[str], str], tmp_path: Path, stopped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    process, launch_id = rank
    if not stacks._from_outside(stacks.psutil.Process(process.pid)):
        pytest.skip("needs py-spy and the right to look into other processes")
    if stopped:
        process.send_signal(signal.SIGSTOP)
    assert main([launch_id, str(tmp_path)]) == 0
    assert capsys.readouterr().err == "stacks of ranks [1]\n"
    first, *_, where = innermost(tmp_path, 1)
    assert first.startswith("wait_for_ever (<string>:") and where == f"all stacks: {tmp_path}/stacks-rank-*.txt"


def test_written_by_the_rank_itself_where_nobody_may_look(
    rank: tuple[subprocess.Popen[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, launch_id = rank
    monkeypatch.setattr(stacks, "_from_outside", lambda process: "")
    assert save_stacks(launch_id, tmp_path) == [1]
    assert "in wait_for_ever" in innermost(tmp_path, 1)[0]
    stacks_file(tmp_path, 1).unlink()
    monkeypatch.setattr(stacks, "_WRITE_SECONDS", 0.3)
    process.send_signal(signal.SIGSTOP)
    assert save_stacks(launch_id, tmp_path) == [] and innermost(tmp_path, 1) == ()


def test_a_rank_that_was_not_asked_leaves_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with write_on_signal(tmp_path, 0):
        assert stacks_file(tmp_path, 0).exists()
    stacks_file(tmp_path, 1).write_text("stack")
    drop_empty(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stacks-rank-1.txt"]
    with write_on_signal(tmp_path / "nowhere", 0):
        assert "a hang will show no stacks" in caplog.text


def test_py_spy_that_is_missing_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    me = stacks.psutil.Process()
    monkeypatch.setattr(stacks.shutil, "which", lambda name: None)
    monkeypatch.setattr(stacks.sys, "executable", str(tmp_path / "python"))
    assert stacks._from_outside(me) == ""
    program = tmp_path / "py-spy"
    program.write_text("#!/bin/sh\necho 'Permission denied' >&2; exit 1\n")
    program.chmod(0o755)
    assert stacks._from_outside(me) == "" and "Permission denied" in caplog.text
    program.chmod(0o644)
    assert stacks._from_outside(me) == "" and caplog.text.count("py-spy told nothing") == 2


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and "usage: python -m launch.stacks" in capsys.readouterr().err
