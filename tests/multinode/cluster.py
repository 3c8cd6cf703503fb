"""A launch as a user would start it on the first of some simulated hosts, and what became of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.jobs import World
from tests.multinode.hosts import PORT, SimulatedHost, until

STAGE = "continued_pretraining"
STEPS = 60
SAVE = {"train__checkpoint__every_steps": 2, "train__checkpoint__keep": 5}
"""Of launches that are stopped after their first checkpoint, with enough steps left for the signal to arrive in."""
PAIR = ("host-a", "host-b")
BIN = Path(sys.executable).parent
# the hosts disagree on what their own names resolve to, so gloo must be told which interface they share
ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Cluster:
    """Hosts, and what a test starts on the first."""

    hosts: tuple[SimulatedHost, ...]
    world: World
    folder: Path
    settings: Mapping[str, object]
    """Of every launch, with ``__`` for dots."""

    @property
    def a(self) -> SimulatedHost:
        return self.hosts[0]

    @property
    def b(self) -> SimulatedHost:
        return self.hosts[1]

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def sets(self, **values: object) -> list[str]:
        settings = self.world.sets(STAGE, self.run_dir, 2, **{**self.settings, **values})
        return [part for text in settings for part in ("--set", text)]

    def hostfile(self, *names: str) -> str:
        path = self.folder / "hosts"
        path.write_text("".join(f"{name} slots=1\n" for name in names))
        return str(path)

    def slt(self, *names: str, env: dict[str, str] | None = None, **values: object) -> subprocess.Popen[bytes]:
        """``slt launch run`` on the first host."""
        return self.start(names or PAIR, (), env or {}, "log", values)

    def start(
        self,
        names: tuple[str, ...],
        options: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        log: str = "log",
        values: Mapping[str, object] | None = None,
    ) -> subprocess.Popen[bytes]:
        """The same, with more options."""
        argv = [str(BIN / "slt"), "launch", "run", f"demo_{STAGE}", "--hostfile", self.hostfile(*names)]
        argv += ["--ssh-port", str(PORT), *options, *self.sets(**(values or {}))]
        return self.a.start(argv, self.folder / log, {**ENV, **(env or {})})

    def launcher(self) -> psutil.Process:
        """The process of ``slt launch`` that runs now."""
        found = [process for process in self.a.processes() if process.cmdline()[1:3] == [str(BIN / "slt"), "launch"]]
        return found[0]

    def checkpoints(self) -> set[str]:
        """Names of the complete ones."""
        return {path.parent.name for path in self.a.sees(self.run_dir).glob("checkpoints/step-*/COMPLETE")}

    def in_training_on(
        self, names: tuple[str, ...], process: subprocess.Popen[bytes], before: set[str], log: str
    ) -> dict[int, psutil.Process]:
        """All ranks of a launch, one per host, when it has just written its first checkpoint beside those before."""
        wanted = dict(enumerate(host for host in self.hosts if host.name in names))
        ended = lambda: process.poll() is not None  # noqa: E731
        until(lambda: self.checkpoints() - before or ended(), 180, "first checkpoint", every=0.01)
        ranks = {number: rank for number, host in wanted.items() if (rank := host.rank(number))}
        assert not ended() and len(ranks) == len(wanted), self.said(log)
        return ranks

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 240) -> tuple[int, str]:
        """Exit code and output of a launch of which nothing may be left on any host."""
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds:g} s\n{self.output()}")
        until(lambda: not self.left(), 10, f"gone from all hosts: {self.left()}")
        return code, self.output()

    def output(self) -> str:
        return self.said("log")[-6000:]

    def said(self, log: str) -> str:
        """The output of a launch with this log."""
        return (self.folder / log).read_text()

    def left(self, away: str = "") -> list[str]:
        """What runs on the hosts, but for one that cannot be reached."""
        return [f"{host.name}: {process}" for host in self.hosts if host.name != away for process in host.processes()]
