"""Launches in which every host runs the command itself: torchrun's rendezvous, and DeepSpeed without ssh."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.errors import EXIT_CLUSTER, EXIT_PREEMPTED
from tests.jobs import World, rows
from tests.multinode.cluster import ENV, SAVE, STAGE, STEPS
from tests.multinode.hosts import SimulatedHost, until

pytestmark = pytest.mark.multinode

SLT = str(Path(sys.executable).with_name("slt"))
TORCHRUN = ("--backend", "torchrun", "--nnodes", "2", "--num-procs", "1", "--rdzv-endpoint", "host-a:29400")


@dataclass(frozen=True)
class Pair:
    """Two hosts, one run directory, and the launcher of each."""

    hosts: tuple[SimulatedHost, SimulatedHost]
    world: World
    folder: Path
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self, number: int, *options: str) -> None:
        settings = self.world.sets(STAGE, self.run_dir, 2, train__steps=STEPS, **SAVE)
        argv = [SLT, "launch", "run", f"demo_{STAGE}", *options]
        argv += [part for text in settings for part in ("--set", text)]
        self.launchers.append(self.hosts[number].start(argv, self.folder / f"log-{number}", ENV))

    def finish(self) -> tuple[list[int], list[str]]:
        """Exit codes and outputs; nothing is left on any host."""
        codes = [launcher.wait(timeout=240) for launcher in self.launchers]
        self.launchers.clear()
        until(lambda: not any(host.processes() for host in self.hosts), 10, "gone from both hosts")
        return codes, [(self.folder / f"log-{number}").read_text()[-6000:] for number in range(len(codes))]

    def hostfile(self) -> str:
        path = self.folder / "hosts"
        path.write_text("".join(f"{host.name} slots=1\n" for host in self.hosts))
        return str(path)


@pytest.fixture
def pair(hosts: tuple[SimulatedHost, SimulatedHost], corpus: World, tmp_path: Path) -> Iterator[Pair]:
    yield Pair(hosts[:2], corpus, tmp_path)
    for host in hosts:
        host.clear()


def test_torchrun_on_two_hosts_stopped_and_continued(pair: Pair, local: dict[int, float]) -> None:
    """The same command on both; a signal to one launcher stops all ranks at the same step, with the same exit code."""
    pair.start(0, *TORCHRUN)
    pair.start(1, *TORCHRUN)
    mark = pair.run_dir / "checkpoints" / "step-000002" / "COMPLETE"
    until(lambda: mark.is_file() or pair.launchers[0].poll() is not None, 120, "first checkpoint", every=0.01)
    rank = next(filter(None, (host.rank(1) for host in pair.hosts)))
    rank.suspend()  # so that training cannot end before the signal arrives
    launcher = [found for found in pair.hosts[1].processes() if found.cmdline()[1:3] == [SLT, "launch"]]
    launcher[0].terminate()
    until(lambda: "passed on to the ranks" in (pair.folder / "log-1").read_text(), 20, "signal")
    rank.resume()
    codes, outputs = pair.finish()
    assert codes == [EXIT_PREEMPTED] * 2, "\n".join(outputs)
    assert 2 <= max(rows(pair.run_dir)) < STEPS, "the signal came too late"
    pair.start(0, *TORCHRUN)
    pair.start(1, *TORCHRUN)
    codes, outputs = pair.finish()
    assert codes == [0, 0] and all("launch finished (exit code 0)" in output for output in outputs), outputs
    assert rows(pair.run_dir) == local
    assert (pair.run_dir / "logs" / "launch-node-1.log").is_file(), "the second host's own log"


def test_no_ssh(pair: Pair) -> None:
    """A rank that is killed ends the launchers of both hosts, the other one's with the code of a lost peer."""
    options = [("--hostfile", pair.hostfile(), "--no-ssh", "--node-rank", str(number)) for number in (0, 1)]
    pair.start(0, *options[0])
    pair.start(1, *options[1])
    mark = pair.run_dir / "checkpoints" / "step-000002" / "COMPLETE"
    until(lambda: mark.is_file() or pair.launchers[0].poll() is not None, 120, "first checkpoint", every=0.01)
    rank = pair.hosts[1].rank(1)
    assert rank is not None, (pair.folder / "log-0").read_text()
    rank.kill()
    codes, outputs = pair.finish()
    assert codes == [EXIT_CLUSTER, 128 + signal.SIGKILL] and "rank 1 on host-b" in outputs[1], "\n".join(outputs)
    assert "no report" not in outputs[0], "the other host's ranks are not its own"
