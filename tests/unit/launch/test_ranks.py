from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest

from launch.plan import LAUNCH_ID
from launch.ranks import find_processes, find_ranks, main

# a launcher with two ranks, each with one worker that inherits RANK
TREE = """
import os, subprocess, sys, time
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
RANK = f"import subprocess, time; subprocess.Popen({SLEEP!r}); time.sleep(60)"
for n in range(2):
    subprocess.Popen([sys.executable, "-c", RANK], env={**os.environ, "RANK": str(n)})
time.sleep(60)
"""


@pytest.fixture
def launch() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    launch_id = uuid.uuid4().hex
    tree = subprocess.Popen(
        [sys.executable, "-c", TREE], env={**os.environ, LAUNCH_ID: launch_id}, start_new_session=True
    )
    end = time.monotonic() + 20
    while len(list(find_processes(launch_id))) < 5 and time.monotonic() < end:
        time.sleep(0.05)
    yield launch_id, tree
    os.killpg(tree.pid, signal.SIGKILL)
    tree.wait()


def test_ranks_are_told_from_launchers_and_workers(launch: tuple[str, subprocess.Popen[bytes]]) -> None:
    launch_id, tree = launch
    assert len(list(find_processes(launch_id))) == 5
    ranks = find_ranks(launch_id)
    assert len(ranks) == 2 and {rank.ppid() for rank in ranks} == {tree.pid}
    assert find_ranks("another") == []


def test_signals_by_command_line(
    launch: tuple[str, subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    launch_id, tree = launch
    assert main([launch_id, "SIGTERM"]) == 0
    assert "SIGTERM sent to 2 processes" in capsys.readouterr().err
    assert main([launch_id, "SIGKILL", "--all"]) == 0
    assert tree.wait(timeout=5) == -signal.SIGKILL
    assert main([launch_id, "SIGNONE"]) == 2 and main([]) == 2
    assert "usage: python -m launch.ranks" in capsys.readouterr().err
