from __future__ import annotations

import json
import subprocess
import sys

import pytest

from launch.notes import LAUNCH_ID, read
from launch.slurm_task import rank_variables
from pipeline.errors import ClusterError
from tests.source_tree import ROOT

TASK = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURMD_NODENAME": "n2"}
MASTER = ("n1", "12001")


def variables(places: str = "n1:2,n2:2", **changes: str) -> dict[str, str]:
    return rank_variables({**TASK, **changes}, MASTER, places)


def test_a_task_becomes_a_rank() -> None:
    expected = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "12001"}
    assert variables() == expected
    assert variables(CUDA_VISIBLE_DEVICES="0,1") == variables(CUDA_VISIBLE_DEVICES="-1") == expected


def test_what_srun_must_have_started() -> None:
    with pytest.raises(ClusterError, match="has not set SLURM_PROCID, SLURM_LOCALID, SLURM_NTASKS, SLURMD_NODENAME"):
        rank_variables({}, MASTER, "n1:1")
    with pytest.raises(ClusterError, match=r"SLURM started 4 tasks \(SLURM_NTASKS\) for 3 planned ranks"):
        variables("n1:2,n2:1")
    with pytest.raises(
        ClusterError, match="task 3 was planned as number 1 on n1, but SLURM started it as number 1 on n"
    ):
        variables("n2:2,n1:2")
    with pytest.raises(ClusterError, match="shows task 3 only CUDA_VISIBLE_DEVICES=0, but 2 ranks run on n2"):
        variables(CUDA_VISIBLE_DEVICES="0")


def start(*program: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "launch.slurm_task", *MASTER, "n1:2,n2:2", *program]
    return subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_it_becomes_the_program() -> None:
    say = "import json, os, sys; print(json.dumps([os.environ['RANK'], sys.argv[1:]]))"
    done = start(sys.executable, "-c", say, "--set", "a b", **TASK)
    assert json.loads(done.stdout) == ["3", ["--set", "a b"]] and done.returncode == 0, done.stderr


def test_the_launcher_is_told_why_a_task_cannot_start() -> None:
    done = start("/no/such", **TASK, **{LAUNCH_ID: "id7"})
    _, report = read(done.stderr.strip())
    assert report is not None and report["rank"] == 3 and report["code"] == 3 == done.returncode
    assert "No such file" in report["error"]
