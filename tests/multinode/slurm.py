"""A real SLURM on the simulated hosts: slurmctld and slurmd on the first, slurmd on the second, munge on both.

Everything lives in one folder and in the hosts' own namespaces, so nothing touches a SLURM of this machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.multinode.hosts import SimulatedHost, until

TOOLS = ("slurmctld", "slurmd", "srun", "munged")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# cred_expire is also how long a requeued job waits before it may start again (default: two minutes)
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={first}({first_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
MpiDefault=none
SlurmdTimeout=20
KillWait=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster of simulated hosts; its commands run on the first."""

    hosts: tuple[SimulatedHost, ...]
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """What a user's login has; sbatch must not hand its own variables on to a job by accident."""
        return {
            "PATH": _PATH,
            "HOME": str(Path.home()),
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def call(self, *argv: str, **env: str) -> str:
        """Output of a command on the first host; it must succeed."""
        done = self.run(*argv, **env)
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def run(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.hosts[0].inside(*argv), env={**self.env, **env}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    def state(self, job: str) -> str:
        """A job's state, ``RUNNING`` and the like."""
        words = self.call("scontrol", "show", "job", job, "-o").split()
        return next(word.partition("=")[2] for word in words if word.startswith("JobState="))

    def logs(self) -> str:
        texts = (f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))
        return "\n".join(texts)


def why_no_slurm() -> str:
    """The reason this machine has no SLURM to bring up, or nothing."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_PATH) is None]
    return f"needs {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)" if missing else ""


@contextlib.contextmanager
def slurm_on(hosts: tuple[SimulatedHost, ...], folder: Path) -> Iterator[Slurm]:
    """A cluster whose nodes are idle: partition ``low``, and ``high``, which pre-empts it."""
    cluster = Slurm(hosts, folder)
    munge = f"/run/munge-{folder.name}"  # every host has a /run of its own
    nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=2 RealMemory=4000 Gres=gpu:2" for host in hosts]
    gpus = [f"NodeName={host.name} Name=gpu File={file}" for host in hosts for file in ("/dev/null", "/dev/zero")]
    (folder / "gres.conf").write_text("\n".join(gpus) + "\n")  # two that are none: SLURM only counts files
    text = _CONFIGURATION.format(
        first=hosts[0].name, first_address=hosts[0].address, folder=folder, munge=f"{munge}/socket"
    )
    (folder / "slurm.conf").write_text("\n".join([*nodes, *text.splitlines()]) + "\n")
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    with contextlib.ExitStack() as stack:
        for host in hosts:
            files = [f"--{name}={munge}/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
            start = (
                f"mkdir -m 755 {munge} && exec munged --foreground --force --key-file={folder}/key {' '.join(files)}"
            )
            stack.enter_context(_daemon(cluster, host, "sh", "-c", start))
            until(lambda h=host: not subprocess.run(h.inside("test", "-S", f"{munge}/socket")).returncode, 20, "munged")  # type: ignore[misc]
        stack.enter_context(_daemon(cluster, hosts[0], "slurmctld", "-D", "-c"))
        for host in hosts:
            stack.enter_context(_daemon(cluster, host, "slurmd", "-D", "-N", host.name))
        stack.callback(_end_jobs, cluster)
        until(lambda: set(cluster.run("sinfo", "-h", "-o", "%T").stdout.split()) == {"idle"}, 30, "idle nodes")
        yield cluster


@contextlib.contextmanager
def _daemon(cluster: Slurm, host: SimulatedHost, *argv: str) -> Iterator[None]:
    log = cluster.folder / f"start-{argv[0]}-{host.name}.log"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            host.inside(*argv), env=cluster.env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )
    try:
        yield
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """nsenter waits for the daemon, but passes no signal on."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for daemon in psutil.Process(process.pid).children():
            daemon.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        for daemon in psutil.Process(process.pid).children():
            daemon.kill()
        process.wait()


def _end_jobs(cluster: Slurm) -> None:
    """No job may outlive its slurmd."""
    cluster.run("scancel", "--user=root")
    with contextlib.suppress(AssertionError):
        until(lambda: not cluster.run("squeue", "-h").stdout, 20, "no job")
