"""Drills: faults that clusters do to runs, made on purpose, and what must happen then.

One table for three uses: the tests run a part of it, `make drills` all of it, and the fault table of
docs/resume-and-failures.md says the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import psutil

from pipeline.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_USER
from tests.multinode.cluster import Cluster
from tests.multinode.hosts import until

PAIR = ("host-a", "host-b")
THREE = (*PAIR, "host-c")
DISK_MIB = 24


@dataclass
class Live:
    """A launch in training, for a drill to break."""

    cluster: Cluster
    process: subprocess.Popen[bytes]
    ranks: dict[int, psutil.Process]
    refused: tuple[int, str] | None = None
    """Exit code and output of a launch that a drill started beside it."""
    away: str = ""
    """A host that nobody can reach now."""

    def phase_of(self, rank: int) -> str:
        """What a rank does, by the status that the launch writes."""
        status = json.loads((self.cluster.run_dir / "logs" / "status.json").read_text())
        ranks = {one["rank"]: one for host in status.get("hosts", []) for one in host["ranks"]}
        return str(ranks[rank]["phase"]) if rank in ranks else ""


Inject = Callable[[Live], AbstractContextManager[None]]
"""Breaks something; when its context ends, after the launch has, what is broken is repaired."""


@dataclass(frozen=True)
class Truth:
    """What a drill breaks: what the diagnosis is compared with."""

    kind: str
    """Regular expression for the words that name it."""
    rank: int | None = None
    host: str = ""


@dataclass(frozen=True)
class Drill:
    """A fault and what must follow."""

    name: str
    event: str
    """As the fault table of docs/resume-and-failures.md names it."""
    inject: Inject
    code: int
    """Exit code of the launch it happens to, its restarts included; of the second one for two launches."""
    truth: Truth
    starts: tuple[tuple[str, ...], ...] = (PAIR, PAIR)
    """Hosts of every start of the same command. The fault happens in all but the last, or in the only one."""
    restarts: bool = False
    """The launch goes on by itself."""
    met_at_start: bool = False
    """The next start meets it, and goes on."""
    options: tuple[str, ...] = ()
    """Of `slt launch run`."""
    env: dict[str, str] = field(default_factory=dict)
    between: Callable[[Cluster], None] = lambda cluster: None
    """What happens to the run directory before the second start."""
    disk_mib: int = 0
    """The run directory lies on a disk of this size."""
    bit_equal: bool = True
    """The losses are those of the undisturbed run to the last bit, as the world size never changes."""
    seconds: float = 300
    """Longest time from the fault to the end of the launch."""
    in_ci: bool = True
    """Whether the tests run it: what another drill shows as well is left to `make drills`, which runs all."""

    @property
    def code_of_event(self) -> int:
        """As the fault table says it."""
        return EXIT_OK if self.met_at_start else self.code

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return "-".join(self.name.replace(",", "").split())


@contextlib.contextmanager
def kill_rank(live: Live) -> Iterator[None]:
    live.ranks[1].kill()
    yield


@contextlib.contextmanager
def stop_rank(live: Live) -> Iterator[None]:
    """Once it was heard in training: a rank that starts or saves may be silent for longer."""
    until(lambda: live.phase_of(1) in ("step", "data"), 60, "rank 1 tells that it trains")
    live.ranks[1].suspend()
    yield


@contextlib.contextmanager
def switch_off(live: Live) -> Iterator[None]:
    live.cluster.b.switch_off()
    yield
    live.cluster.b.switch_on()


@contextlib.contextmanager
def unplug(live: Live) -> Iterator[None]:
    live.away = live.cluster.b.name
    with live.cluster.b.unplugged():
        yield
    live.away = ""


@contextlib.contextmanager
def terminate_launcher(live: Live) -> Iterator[None]:
    live.cluster.launcher().terminate()
    yield


@contextlib.contextmanager
def terminate_everything(live: Live) -> Iterator[None]:
    """As a scheduler does: every process of the job on every host at once."""
    for host in live.cluster.hosts:
        for process in host.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() != "sshd":
                    process.terminate()
    yield


@contextlib.contextmanager
def launch_again(live: Live) -> Iterator[None]:
    second = live.cluster.start(PAIR, log="second")
    live.refused = second.wait(timeout=60), (live.cluster.folder / "second").read_text()
    yield


@contextlib.contextmanager
def fill_disk(live: Live) -> Iterator[None]:
    """All but a little, so that it is the next checkpoint that does not fit."""
    folder = live.cluster.a.sees(live.cluster.run_dir)
    ballast = folder / "ballast"
    free = os.statvfs(folder)
    with ballast.open("wb") as handle:
        handle.write(b"\0" * max(free.f_bavail * free.f_frsize - (192 << 10), 0))
    yield
    ballast.unlink()


def damage_newest(cluster: Cluster) -> None:
    """One flipped bit in the largest file of the newest checkpoint."""
    newest = max(path.parent for path in (cluster.run_dir / "checkpoints").glob("step-*/COMPLETE"))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


SSH_NOTICES = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=1 -o ServerAliveCountMax=3 -o ConnectTimeout=3"}
"""ssh gives up a silent host after three seconds, not after a minute: for hurried tests."""
SOON = ("--restart-delay", "1")
HURRIED = (*SOON, "--hang-seconds", "8")

DRILLS = (
    Drill("kill a rank", "a rank is killed (out of memory, `kill -9`)", kill_rank, EXIT_OK,
          Truth("killed", rank=1, host="host-b"), starts=(PAIR,), restarts=True, options=SOON, in_ci=False),
    Drill("stop a rank", "a rank hangs", stop_rank, EXIT_OK,
          Truth("silent .* stopped", rank=1, host="host-b"), starts=(PAIR,), restarts=True, options=HURRIED),
    Drill("kill a host", "a host is lost", switch_off, EXIT_OK, Truth("connection", host="host-b"),
          starts=(PAIR,), restarts=True, options=SOON, env=SSH_NOTICES, bit_equal=False, in_ci=False),
    Drill("cut a link", "a host drops off the network", unplug, EXIT_OK, Truth("connection", host="host-b"),
          starts=(PAIR,), restarts=True, options=(*SOON, "--export", "SLT_ABANDONED_SECONDS=10"), env=SSH_NOTICES,
          bit_equal=False, in_ci=False),
    Drill("SIGTERM everywhere", "SIGTERM or SIGUSR1 (preemption)", terminate_everything, EXIT_PREEMPTED,
          Truth("stopped, saved at step"), in_ci=False),
    Drill("corrupt the newest checkpoint", "damaged newest checkpoint", terminate_launcher, EXIT_PREEMPTED,
          Truth("damaged"), between=damage_newest, met_at_start=True, in_ci=False),
    Drill("fill the disk during a save", "full disk", fill_disk, EXIT_USER,
          Truth("could not be written"), disk_mib=DISK_MIB, in_ci=False),
    Drill("one host fewer, then one more", "fewer or more hosts at the next start", terminate_launcher,
          EXIT_PREEMPTED, Truth("stopped, saved at step"), starts=(THREE, PAIR, THREE), bit_equal=False,
          met_at_start=True),
    Drill("two launches", "a second run on the same run directory", launch_again, EXIT_USER,
          Truth("is in use by process", host="host-a"), starts=(PAIR,), in_ci=False),
)  # fmt: skip
