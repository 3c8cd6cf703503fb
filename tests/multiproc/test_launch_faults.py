"""`slt launch run` with two real ranks on this machine: what breaks is named, ended and, where it helps, restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.ranks import find_processes, find_ranks, number_of
from pipeline.errors import EXIT_CLUSTER, EXIT_OK, EXIT_PREEMPTED
from tests.jobs import World, rows, run_job
from tests.source_tree import ROOT

pytestmark = pytest.mark.multiproc

STAGE, STEPS = "continued_pretraining", 40
SETTINGS: dict[str, object] = {"train__steps": STEPS, "train__checkpoint__every_steps": 5}
RARELY: dict[str, object] = {"train__checkpoint__every_steps": 1000}
SLT = Path(sys.executable).parent / "slt"


@dataclass
class Launch:
    """A launch in the background, and what its folder says of it."""

    process: subprocess.Popen[str]
    run_dir: Path

    @property
    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.run_dir / "logs" / "status.json").read_text())
            return found
        except FileNotFoundError:
            return {}

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank that has told of steps."""

        def steps() -> int:
            ranks = [rank for host in self.status.get("hosts", []) for rank in host["ranks"]]
            return sum(1 for rank in ranks if (rank["step"] or 0) >= 3)

        self.until(lambda: steps() == 2, "both ranks step")
        return next(rank for rank in find_ranks(self.status["launch_id"]) if number_of(rank) == number)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0][-4000:]
            assert time.monotonic() < deadline, f"not within 120 s: {what}"
            time.sleep(0.05)

    def finish(self) -> tuple[int, str]:
        """Exit code and output of a launch of which nothing may be left."""
        output = self.process.communicate(timeout=180)[0]
        assert not list(find_processes(self.status["launch_id"])), output[-4000:]
        return self.process.returncode, output


Start = Callable[..., Launch]


@pytest.fixture
def start(corpus: World, tmp_path: Path) -> Iterator[Start]:
    started: list[Launch] = []

    def begin(*options: str, **settings: object) -> Launch:
        run_dir = tmp_path / "run"
        sets = corpus.sets(STAGE, run_dir, 2, **{**SETTINGS, **settings})
        argv = [str(SLT), "launch", "run", f"demo_{STAGE}", "--num-procs", "2", "--restart-delay", "0.1", *options]
        argv += [part for text in sets for part in ("--set", text)]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        process = subprocess.Popen(argv, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started.append(Launch(process, run_dir))
        return started[-1]

    yield begin
    for launch in started:
        launch.process.kill()
        for process in find_processes(launch.status.get("launch_id", "none")):
            process.kill()


@pytest.fixture(scope="module")
def undisturbed(corpus: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    run_job(STAGE, corpus.sets(STAGE, run_dir, 2, **SETTINGS), 2)
    return rows(run_dir)


def test_a_rank_that_is_killed_costs_an_attempt_and_no_step(start: Start, undisturbed: dict[int, float]) -> None:
    """A rank that is stopped is a drill on simulated hosts."""
    launch = start()
    launch.rank(1).kill()
    code, output = launch.finish()
    assert code == EXIT_OK, output[-4000:]
    assert rows(launch.run_dir) == undisturbed
    (restart,) = launch.status["restarts"]
    assert restart["code"] == 128 + signal.SIGKILL, output[-4000:]
    assert restart["cause"].startswith("rank 1 on localhost: killed, or ended without a word"), restart
    assert f"attempt 2 on localhost ended at step {STEPS} with exit code 0" in output
    log = (launch.run_dir / "logs" / "launch.log").read_text()
    assert "attempt 1 of launch" in log and "attempt 2 of launch" in log and "slt-rank-report" not in log


def test_a_loader_that_blocks_is_told_from_the_ranks_that_wait(start: Start) -> None:
    """The worker of rank 1 is stopped: that rank beats and waits for data, rank 0 waits for it in a collective."""
    launch = start("--hang-seconds", "12", "--max-restarts", "0", data__workers=1, train__steps=4000, **RARELY)
    rank = launch.rank(1)
    workers: list[psutil.Process] = []

    def reading() -> bool:
        """The fork server has started one that has had time to take over: until then the rank reads by itself."""
        found = [worker for child in rank.children() for worker in child.children()]
        workers[:] = [worker for worker in found if time.time() - worker.create_time() > 8]
        return bool(workers)

    launch.until(reading, "rank 1 has a worker")
    for worker in workers:
        worker.suspend()
    code, output = launch.finish()
    assert code == EXIT_CLUSTER, output[-4000:]
    assert "  rank 1 on localhost: hangs: for" in output and "in `data` after step" in output
    assert "  rank 0 on localhost: ended because of that" in output
    assert (
        "stacks-rank-*.txt" in output and "Trainer.fit" in (launch.run_dir / "logs" / "stacks-rank-0.txt").read_text()
    )


def test_stopped_by_another_process(start: Start) -> None:
    launch = start(train__steps=4000, **RARELY)
    launch.rank(0)
    shown = subprocess.run([SLT, "launch", "status", launch.run_dir], capture_output=True, text=True, check=True).stdout
    assert ": running on 2 ranks, attempt 1" in shown and "of 4000" in shown and "localhost: rank 1 step" in shown
    stop = subprocess.run([SLT, "launch", "stop", launch.run_dir], capture_output=True, text=True, check=False)
    code, output = launch.finish()
    assert code == EXIT_PREEMPTED and "stop requested by" in output, output[-4000:]
    assert stop.returncode == 0 and "launch stopped, saved at step" in stop.stdout, stop.stderr
    shown = subprocess.run([SLT, "launch", "status", launch.run_dir], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("no launch runs here; the last one ended")
