"""The real DeepSpeed launcher under our supervisor: exit codes, signals, and nothing left behind.

The ranks are stand-ins that use the standard library only, so this is about processes, not about training.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from launch.backends import get_backend
from launch.hostfile import Host
from launch.options import free_port
from launch.plan import LaunchPlan, plan_ranks
from launch.processes import Patience
from launch.ranks import find_processes, find_ranks
from launch.supervise import Outcome, supervise
from tests.unit.launch import stubs

pytestmark = pytest.mark.multiproc


def launch(folder: Path, mode: str, backend: str = "local", stop: bool = False) -> Outcome:
    hosts = (Host("localhost", (0, 1)),)
    hostfile = folder / "hosts"
    hostfile.write_text("localhost slots=2\n")
    plan = LaunchPlan(
        script=Path(stubs.__file__),
        arguments=("rank", str(folder), mode),
        run_dir=folder,
        hosts=hosts,
        ranks=plan_ranks(hosts, "127.0.0.1", free_port()),
        launch_id=f"test-{os.getpid()}-{folder.name}",
        env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        hostfile=hostfile if backend == "deepspeed" else None,
    )

    def send() -> None:
        while len(list(folder.glob("ready-*"))) < 2:
            time.sleep(0.05)
        ranks = find_ranks(plan.launch_id)
        (folder / "found").write_text(",".join(str(rank.pid) for rank in ranks))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send, daemon=True)
    if stop:
        thread.start()
    command = get_backend(backend).command(plan)
    outcome = supervise(command, folder, (plan.launch_id, 2), Patience(grace_seconds=60))
    assert not list(find_processes(plan.launch_id)), "processes were left behind"
    return outcome


def test_a_good_end_through_a_hostfile(tmp_path: Path) -> None:
    outcome = launch(tmp_path, "ok", backend="deepspeed")
    assert (outcome.code, outcome.rank_codes) == (0, {0: 0, 1: 0})


def test_the_failing_rank_decides(tmp_path: Path) -> None:
    outcome = launch(tmp_path, "fail")
    assert outcome.code == 4 and outcome.errors[1] == "shard 3 is damaged"
    log = (tmp_path / "logs" / "launch.log").read_text()
    assert "hello from rank 1" in log and "return code" not in log, "DeepSpeed's own error line, with the whole command"


def test_a_killed_rank_is_137(tmp_path: Path) -> None:
    assert launch(tmp_path, "die").code == 137


def test_sigterm_reaches_the_ranks_alone(tmp_path: Path) -> None:
    outcome = launch(tmp_path, "workers", stop=True)
    assert outcome.code == 75 and outcome.rank_codes == {0: 75, 1: 75} and outcome.signals == (signal.SIGTERM,)
    ready = {(tmp_path / f"ready-{rank}").read_text() for rank in range(2)}
    assert set((tmp_path / "found").read_text().split(",")) == ready
