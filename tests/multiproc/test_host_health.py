"""A real trial: three processes play three hosts, and one of them computes wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.health import judge
from launch.hostfile import Host
from launch.options import free_port
from launch.plan import LaunchPlan, plan_ranks
from pipeline.engine.host_health import MARK
from tests.source_tree import ROOT

# a device that multiplies wrongly now and then, on the host that was told so
FAULTY = """
import sys, torch
from pipeline.engine import host_health
times = []
def wrong(left, right, matmul=torch.Tensor.__matmul__):
    product = matmul(left, right)
    product[3, 5] += 1
    return product
torch.Tensor.__matmul__ = wrong
sys.exit(host_health.main(sys.argv[1:]))
"""


def test_a_host_that_computes_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tuple(Host(name, (0,)) for name in "abc")
    plan = LaunchPlan(Path("x"), (), tmp_path, hosts, plan_ranks(hosts, "127.0.0.1", free_port()), "id7")
    question = {"level": "quick", "hosts": 3, "address": "127.0.0.1", "port": plan.master_port, "devices": [0]}
    for name, value in {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    started = []
    for name in "abc":
        program = ["-c", FAULTY] if name == "b" else ["-m", "pipeline.engine.host_health"]
        argv = [sys.executable, *program, json.dumps({**question, "seconds": 100})]
        started.append(subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    output = [process.communicate(timeout=120)[0] for process in started]
    answers = {name: json.loads(text.removeprefix(MARK)) for name, text in zip("abc", output, strict=True)}
    for one in answers.values():
        assert one["gib_per_second"] > 0 and one["all_reduce_gib_per_second"] > 0, answers
        one["devices"]["0"]["tflops"] = one["gib_per_second"] = 1.0  # speeds of a shared machine mean nothing
    assert judge(plan, answers) == {"b": "its CPU computes another product than the others"}
