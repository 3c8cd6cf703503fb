"""Training over two simulated hosts through real ssh and pdsh: started as a user would, broken, started again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import EXIT_CLUSTER, EXIT_PREEMPTED
from tests.jobs import World, rows, run_job
from tests.multinode.hosts import PORT, SimulatedHost, until

pytestmark = pytest.mark.multinode

STAGE = "continued_pretraining"
STEPS = 6
BIN = Path(sys.executable).parent
# host-a and host-b disagree on what their own names resolve to, so gloo must be told which interface they share
ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Cluster:
    """Two hosts and what a test starts on the first."""

    a: SimulatedHost
    b: SimulatedHost
    world: World
    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def sets(self, **values: object) -> list[str]:
        settings = self.world.sets(STAGE, self.run_dir, 2, train__steps=STEPS, **values)
        return [part for text in settings for part in ("--set", text)]

    def hostfile(self, *names: str) -> str:
        path = self.folder / "hosts"
        path.write_text("".join(f"{name} slots=1\n" for name in names))
        return str(path)

    def slt(self, names: tuple[str, ...] = ("host-a", "host-b"), **values: object) -> subprocess.Popen[bytes]:
        """``slt launch run`` on the first host."""
        options = ["--hostfile", self.hostfile(*names), "--ssh-port", str(PORT)]
        argv = [str(BIN / "slt"), "launch", "run", f"demo_{STAGE}", *options, *self.sets(**values)]
        return self.a.start(argv, self.folder / "log", ENV)

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 240) -> tuple[int, str]:
        """Exit code and output of a launch of which nothing may be left on any host."""
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds:g} s\n{self.output()}")
        until(lambda: not self.left(), 10, f"gone from both hosts: {self.left()}")
        return code, self.output()

    def output(self) -> str:
        return (self.folder / "log").read_text()[-6000:]

    def left(self) -> list[str]:
        return [f"{host.name}: {process}" for host in (self.a, self.b) for process in host.processes()]


@pytest.fixture
def cluster(hosts: tuple[SimulatedHost, SimulatedHost], corpus: World, tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(*hosts, corpus, tmp_path)
    for host in hosts:
        host.clear()


@pytest.fixture(scope="session")
def local(hosts: object, corpus: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses per step of two ranks on one host."""
    run_dir = tmp_path_factory.mktemp("local")
    run_job(STAGE, corpus.sets(STAGE, run_dir, 2, train__steps=STEPS), 2)
    return rows(run_dir)


def test_deepspeed_as_a_user_would(cluster: Cluster, local: dict[int, float]) -> None:
    (cluster.folder / "env").write_text("".join(f"{name}={value}\n" for name, value in ENV.items()))
    argv = [str(BIN / "deepspeed"), "--hostfile", cluster.hostfile("host-a", "host-b"), "--ssh_port", str(PORT)]
    argv += ["launch/train.py", f"demo_{STAGE}", *cluster.sets()]
    process = cluster.a.start(argv, cluster.folder / "log", ENV | {"DS_ENV_FILE": str(cluster.folder / "env")})
    code, output = cluster.finish(process)
    assert code == 0, output
    assert rows(cluster.run_dir) == local


def test_slt_launch(cluster: Cluster, local: dict[int, float]) -> None:
    code, output = cluster.finish(cluster.slt())
    assert code == 0, output
    assert rows(cluster.run_dir) == local
    assert (cluster.run_dir / "logs" / "rank-1.log").is_file() and "launch finished (exit code 0)" in output


def test_a_rank_killed_on_the_other_host(cluster: Cluster, local: dict[int, float]) -> None:
    """The launch ends by itself; the same command resumes and ends with the losses of an undisturbed run."""
    every = {"train__checkpoint__every_steps": 2, "train__checkpoint__keep": 5}
    first = cluster.run_dir / "checkpoints" / "step-000002" / "COMPLETE"
    process = cluster.slt(**every)
    until(lambda: first.is_file() or process.poll() is not None, 120, "first checkpoint")
    victim = cluster.b.rank(1)
    assert victim is not None, cluster.output()
    victim.kill()
    killed = time.monotonic()
    code, output = cluster.finish(process, seconds=90)
    print(f"ended after {time.monotonic() - killed:.1f} s", code, output)
    assert code == 128 + signal.SIGKILL, output
    assert max(rows(cluster.run_dir)) < STEPS, "the kill came too late"
    code, output = cluster.finish(cluster.slt(**every))
    assert code == 0 and "at step" in output, output
    assert rows(cluster.run_dir) == local


def test_an_unreachable_host(cluster: Cluster) -> None:
    start = time.monotonic()
    code, output = cluster.finish(cluster.slt(("host-a", "host-c")), seconds=60)
    print(f"{time.monotonic() - start:.1f} s", output)
    assert code == EXIT_CLUSTER and "host-c" in output
