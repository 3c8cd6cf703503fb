"""Training under a real SLURM of two simulated hosts: submitted as a user would, pre-empted, queued again, finished."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.backends import get_backend
from launch.hostfile import Host
from launch.plan import LaunchPlan, plan_ranks
from tests.jobs import World, rows
from tests.multinode.cluster import ENV, SAVE, STAGE, STEPS
from tests.multinode.hosts import SimulatedHost, until
from tests.multinode.slurm import Slurm, slurm_on, why_no_slurm
from tests.source_tree import ROOT

pytestmark = pytest.mark.multinode

SLT = str(Path(sys.executable).with_name("slt"))


@dataclass(frozen=True)
class Cluster:
    """A SLURM and one run directory."""

    slurm: Slurm
    world: World
    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def sets(self, **values: object) -> list[str]:
        settings = self.world.sets(STAGE, self.run_dir, 2, train__steps=STEPS, **values)
        return [part for text in settings for part in ("--set", text)]

    def submit(self, *options: str, **values: object) -> str:
        """The number of a job on both hosts, submitted by `slt launch submit`."""
        argv = (SLT, "launch", "submit", f"demo_{STAGE}", "--nodes", "2", "--cpus-per-task", "2", *options)
        output = self.slurm.call(*argv, *self.sets(**values), **ENV)
        return output.split()[1]

    def rank_1(self, job: str) -> SimulatedHost:
        """The second host, when rank 1 runs there and the first checkpoint is complete."""
        mark = self.run_dir / "checkpoints" / "step-000002" / "COMPLETE"
        host = self.slurm.hosts[1]
        until(lambda: mark.is_file() or self.ended(job), 120, "first checkpoint", every=0.01)
        return host

    def ended(self, job: str) -> bool:
        return self.slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED")

    def output(self, job: str) -> str:
        log = self.run_dir / "logs" / f"slurm-{job}.log"
        return log.read_text() if log.is_file() else self.slurm.logs()

    def nothing_runs(self) -> bool:
        daemons = ("munged", "slurmctld", "slurmd", "slurmscriptd", "slurmstepd", "nsenter")
        return not [p for host in self.slurm.hosts for p in host.processes() if p.name() not in daemons]


@pytest.fixture(scope="module")
def slurm(hosts: tuple[SimulatedHost, SimulatedHost], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    reason = why_no_slurm()
    if reason:
        pytest.skip(reason)
    with slurm_on(hosts, tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
    for host in hosts:
        host.clear()


@pytest.fixture
def cluster(slurm: Slurm, corpus: World, tmp_path: Path) -> Cluster:
    return Cluster(slurm, corpus, tmp_path)


SAY = """
import json, os, sys
names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES SLURMD_NODENAME A".split()
print(json.dumps([*map(os.environ.get, names), sys.argv[1:]]), "x" * 900, flush=True)
"""


def test_what_a_rank_is_told(slurm: Slurm, tmp_path: Path) -> None:
    """Two ranks on each of two nodes, in a job that asked for one task each; a line as long as a report is not cut."""
    (tmp_path / "say.py").write_text(SAY)
    hosts = tuple(Host(host.name, (0, 1)) for host in slurm.hosts)
    plan = LaunchPlan(
        tmp_path / "say.py", ("a b",), tmp_path, hosts, plan_ranks(hosts, "host-a", 12001), "id7",
        env={"A": "x\n%h", "PYTHONPATH": str(ROOT)}, accelerator="gpu", cpus_per_rank=1,
    )  # fmt: skip
    command = get_backend("slurm").command(plan)
    salloc = ("salloc", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=2")
    lines = [line for line in slurm.call(*salloc, *command.argv).splitlines() if line.endswith("x" * 900)]
    said = sorted(json.loads(line.removesuffix("x" * 900)) for line in lines)
    assert said == [
        [str(rank), str(rank % 2), "4", "host-a", "12001", "0,1", f"host-{'ab'[rank // 2]}", "x\n%h", ["a b"]]
        for rank in range(4)
    ]
    output = slurm.call(*salloc, *command.on_hosts("echo 50% $(hostname) $(printf %03000d 7)"))
    for host in slurm.hosts:
        assert command.lines_of(host.name, output) == [f"50% {host.name} {7:03000d}"]


def test_pre_empted_saved_queued_again_and_finished(cluster: Cluster, local: dict[int, float]) -> None:
    """A job of a higher partition takes both nodes; the run saves, waits for its turn, and ends with equal losses."""
    job = cluster.submit(**SAVE)
    rank = cluster.rank_1(job).rank(1)
    assert rank is not None, cluster.output(job)
    rank.suspend()  # training cannot end before the pre-emption; SLURM wakes its tasks before it asks them to stop
    script = ("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    other = cluster.slurm.call(*script, "--wrap", "sleep 2").strip()
    until(lambda: cluster.slurm.state(other) == "COMPLETED", 120, f"the other job\n{cluster.output(job)}")
    saved = max(rows(cluster.run_dir))
    assert 2 <= saved < STEPS, f"pre-empted too late\n{cluster.output(job)}"
    assert f"job {job} goes back into the queue (start 2, at most 101)" in cluster.output(job)
    until(lambda: cluster.slurm.state(job) == "COMPLETED", 120, f"the end\n{cluster.output(job)}")
    assert "launch finished (exit code 0)" in cluster.output(job) and rows(cluster.run_dir) == local
    until(cluster.nothing_runs, 10, "nothing is left")
