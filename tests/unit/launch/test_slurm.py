from __future__ import annotations

from pathlib import Path

import pytest

from launch.hostfile import Host
from launch.options import LaunchOptions, build_plan
from launch.requeue import requeue
from launch.slurm import Allocation, expand_counts, hostnames, read_allocation
from launch.stop import request_stop
from pipeline.errors import ClusterError, RecipeError

JOB = {
    "SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_CPUS_PER_NODE": "16,8", "SLURM_RESTART_COUNT": "3", "ENVIRONMENT": "BATCH",
}  # fmt: skip
ANSWERS = '[ "$2" = job ] && echo JobId=1234 ReqNodeList=n1 NodeList=n[1-2] || { echo n1; echo n2; }'
GPU_RECIPE = "phoenix14t_contrastive_8xh100"


def two(nodelist: str) -> list[str]:
    return ["n1", "n2"]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a test writes its SLURM commands."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))  # a SLURM of this machine must not answer
    return folder


def tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_what_a_job_has() -> None:
    job = read_allocation(JOB, two)
    assert job == Allocation("1234", ("n1", "n2"), 2, 0, 8, restarts=3, is_batch=True)
    assert job.hosts(None, gpus=False) == (Host("n1", (0, 1)), Host("n2", (0, 1)))
    assert job.hosts(3, gpus=False)[1].slots == 3
    without = {key: value for key, value in JOB.items() if key not in ("SLURM_NTASKS", "ENVIRONMENT")}
    alone = read_allocation(without, two)
    assert alone.hosts(None, gpus=False)[0].slots == 1 and not alone.is_batch, "salloc without a number of tasks"
    assert job.port != read_allocation({**JOB, "SLURM_JOB_ID": "1235"}, two).port
    assert 1024 < Allocation("99999999", ("a",), 0, 0, 0).port < 32768, "below the ports that systems hand out"


@pytest.mark.parametrize(
    "variables", [
        {"SLURM_GPUS_ON_NODE": "4"}, {"SLURM_GPUS_PER_NODE": "a100:4"}, {"SLURM_JOB_GPUS": "0,1,2,3"},
        {"SLURM_STEP_GPUS": "4,5,6,7"},
    ],
)  # fmt: skip
def test_gpus_of_a_job(variables: dict[str, str]) -> None:
    job = read_allocation({**JOB, **variables}, two)
    assert job.gpus_per_node == 4 and [host.slots for host in job.hosts(None, gpus=True)] == [4, 4]


def test_what_a_job_cannot_run() -> None:
    with pytest.raises(RecipeError, match="SLURM_JOB_ID and SLURM_JOB_NODELIST are not set; submit a job with `slt la"):
        read_allocation({})
    with pytest.raises(RecipeError, match="different numbers of tasks; submit it with --ntasks-per-node"):
        read_allocation({**JOB, "SLURM_TASKS_PER_NODE": "2,1"}, two)
    job = read_allocation(JOB, two)
    with pytest.raises(RecipeError, match=r"SLURM job 1234 has none \(SLURM_GPUS_ON_NODE is not set\)"):
        job.hosts(None, gpus=True)
    with pytest.raises(RecipeError, match="9 ranks on every node need a processor core each, but SLURM job 1234 has 8"):
        job.hosts(9, gpus=False)
    job = read_allocation({**JOB, "SLURM_GPUS_ON_NODE": "4"}, two)
    with pytest.raises(RecipeError, match="--num-procs 5 needs 5 GPUs on every node, but SLURM job 1234 has 4"):
        job.hosts(5, gpus=True)


def test_counts_per_node() -> None:
    assert expand_counts("8(x2),4") == [8, 8, 4] and expand_counts("") == []


def test_names_of_nodes(tools: Path) -> None:
    with pytest.raises(ClusterError, match=r"`scontrol show hostnames n\[1-2\]` does not work here"):
        hostnames("n[1-2]")
    tool(tools, "scontrol", 'echo "$@"; echo n2')
    assert hostnames("n1") == ["show", "hostnames", "n1", "n2"]
    tool(tools, "scontrol", "echo no such list >&2; exit 1")
    with pytest.raises(ClusterError, match="failed: no such list"):
        hostnames("n1")


def test_nodes_that_a_job_has_lost(tools: Path) -> None:
    tool(tools, "scontrol", '[ "$2" = job ] && echo JobId=1234 NodeList=n2 || echo "$3"')
    assert read_allocation(JOB).nodes == ("n2",)
    tool(tools, "scontrol", "echo JobId=1234")
    with pytest.raises(ClusterError, match="`scontrol show job 1234` names no NodeList"):
        read_allocation(JOB)


def build(environ: dict[str, str], **given: object):  # type: ignore[no-untyped-def]
    values = {"recipe": "demo_connector", "backend": "slurm", "sets": ["train.micro_batch=8"], **given}
    return build_plan(LaunchOptions(**values), environ)  # type: ignore[arg-type]


def test_a_plan_in_a_job(tools: Path) -> None:
    tool(tools, "scontrol", ANSWERS)
    plan, _ = build(JOB)
    assert [(rank.host, rank.local_rank) for rank in plan.ranks] == [("n1", 0), ("n1", 1), ("n2", 0), ("n2", 1)]
    assert (plan.master_addr, plan.master_port) == ("n1", 13234) and plan.env["DS_ACCELERATOR"] == "cpu"
    assert plan.cpus_per_rank == 4 and plan.env["OMP_NUM_THREADS"] == "4"
    assert build(JOB, exclude="n1", master_port=7)[0].ranks[0].master == ("n2", 7)
    plan, _ = build({**JOB, "SLURM_GPUS_ON_NODE": "8"}, recipe=GPU_RECIPE, sets=["train.world_sizes=[16]"])
    assert plan.world_size == 16 and plan.needs_gpus and plan.env["DS_ACCELERATOR"] == "cuda"


def test_no_plan_in_a_job(tools: Path, tmp_path: Path) -> None:
    tool(tools, "scontrol", ANSWERS)
    with pytest.raises(RecipeError, match="--backend slurm takes its hosts from the allocation; leave out --hostfile"):
        build(JOB, hostfile=tmp_path / "hosts")
    with pytest.raises(
        RecipeError, match=r"a recipe for GPUs .*but SLURM job 1234 has none; submit it with --gpus-per"
    ):
        build(JOB, recipe=GPU_RECIPE)


def again(job: Allocation, run_dir: Path, most: int) -> str:
    said: list[str] = []
    requeue(job, run_dir, most, said.append)
    return "; ".join(said)


def test_a_job_is_queued_again(tools: Path, tmp_path: Path) -> None:
    job = read_allocation(JOB, two)
    tool(
        tools, "scontrol", 'echo "$@" >> ' + str(tmp_path / "asked") + "; echo JobId=1234 JobState=RUNNING Reason=None"
    )
    assert again(job, tmp_path, 9) == "job 1234 goes back into the queue (start 5, at most 10)"
    assert (tmp_path / "asked").read_text() == "show job 1234 -o\nrequeue 1234\n"


def test_a_job_is_not_queued_again(tools: Path, tmp_path: Path) -> None:
    job = read_allocation(JOB, two)
    assert "it was 3 times, the limit (--max-requeues 3); submit it again" in again(job, tmp_path, 3)
    assert "scontrol does not answer" in again(job, tmp_path, 9)
    tool(tools, "scontrol", "echo JobId=1234 JobState=COMPLETING Reason=None")
    assert again(job, tmp_path, 9) == "job 1234 is not queued again: its state is COMPLETING", "scancel"
    tool(tools, "scontrol", 'echo JobState=RUNNING; [ "$1" = show ] || { echo disabled >&2; exit 1; }')
    assert "is not queued again: JobState=RUNNING\ndisabled; submit it again" in again(job, tmp_path, 9)
    tool(tools, "scontrol", 'echo JobState=RUNNING; [ "$1" = show ] || kill $$')
    assert again(job, tmp_path, 9) == "job 1234 goes back into the queue (start 5, at most 10)", "SLURM ended all of it"
    request_stop(tmp_path, now=False)
    assert " asked for its end" in again(job, tmp_path, 9)
    assert again(Allocation("1", ("n1",), 1, 0, 1), tmp_path, 9) == "", "salloc: the user is there"
