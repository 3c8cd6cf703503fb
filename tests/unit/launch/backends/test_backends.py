from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest

from launch.arrive import unpack
from launch.backends import BACKENDS, Command, get_backend
from launch.backends.deepspeed import is_this_machine
from launch.hostfile import Host
from launch.options import LaunchOptions, build_plan
from launch.plan import LAUNCH_ID, LaunchPlan, plan_ranks
from launch.slurm import Allocation
from pipeline.config import resolve
from pipeline.config.recipe_file import write_resolved
from pipeline.errors import RecipeError


def plan(*hosts: Host, **changes: object) -> LaunchPlan:
    values: dict[str, object] = {
        "script": Path("/p/train.py"), "arguments": ("r.yaml", "--set", "a=1"), "run_dir": Path("/runs/x"),
        "hosts": hosts, "ranks": plan_ranks(hosts, hosts[0].name, 29500), "launch_id": "id7",
        "env": {"OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    return LaunchPlan(**{**values, **changes})  # type: ignore[arg-type]


def world(argv: tuple[str, ...]) -> dict[str, list[int | str]]:
    (text,) = [part.removeprefix("--world_info=") for part in argv if part.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(text))  # type: ignore[no-any-return]


def test_local() -> None:
    command = get_backend("local").command(plan(Host("localhost", (0, 1))))
    assert command.argv[:4] == (sys.executable, "-u", "-m", "deepspeed.launcher.launch")
    expected = (
        "--master_addr=localhost --master_port=29500 --no_local_rank --log_level=critical /p/train.py r.yaml --set a=1"
    )
    assert shlex.join(command.argv[5:]) == expected and world(command.argv) == {"localhost": [0, 1]}
    assert command.env == {"OMP_NUM_THREADS": "1", LAUNCH_ID: "id7"} and command.remote is None


def test_local_keeps_to_the_named_devices() -> None:
    command = get_backend("local").command(plan(Host("localhost", (5, "GPU-8f2a", "MIG-1c"))))
    assert world(command.argv) == {"localhost": [5, "GPU-8f2a", "MIG-1c"]}


def test_ranks_that_were_asked_to_use_the_cpu_find_no_gpu() -> None:
    command = get_backend("local").command(plan(Host("localhost", (0, 1)), accelerator="cpu"))
    assert world(command.argv) == {"localhost": [-1, -1]}


def test_local_refuses_hosts() -> None:
    with pytest.raises(RecipeError, match="--backend local runs on this machine only, got 2 hosts"):
        get_backend("local").command(plan(Host("a", (0,)), Host("b", (0,))))


def test_deepspeed_on_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F cfg")
    hosts = (Host("a", (0, 1)), Host("b", (1,)))
    command = get_backend("deepspeed").command(plan(*hosts, hostfile=Path("hosts"), ssh_port=2222))
    assert command.argv[:8] == ("pdsh", "-R", "ssh", "-S", "-f", "2", "-w", "a,b") and len(command.argv) == 9
    assert command.argv[8].endswith(" --node_rank=%n") and command.arrives is not None
    before, after, env, folder = unpack(command.argv[8].split()[-2])
    assert tuple(map(os.fsdecode, before + after)) == command.arrives.argv and folder == os.fsencode(Path.cwd())
    assert world(command.arrives.argv) == {"a": [0, 1], "b": [1]}
    assert env == {b"OMP_NUM_THREADS": b"1", LAUNCH_ID.encode(): b"id7"} and LAUNCH_ID not in command.env
    ending = "--master_addr=a --master_port=29500 --no_local_rank --log_level=critical /p/train.py r.yaml --set a=1"
    assert os.fsdecode(b" ".join(after)) == ending
    assert command.env["PDSH_SSH_ARGS_APPEND"].startswith("-F cfg -p 2222 -o ServerAliveInterval=")
    assert "-o ConnectTimeout=15 -o BatchMode=yes" in command.env["PDSH_SSH_ARGS_APPEND"]
    assert command.lost_host is not None
    lost = re.match(command.lost_host, "pdsh@here: node-1.example: ssh exited with exit code 255")
    assert lost is not None and lost[1] == "node-1.example"
    assert not re.match(command.lost_host, "pdsh@here: b: ssh exited with exit code 247")
    assert command.on_hosts("echo 50%") == [*command.argv[:8], "echo 50%%"]
    assert command.host_of("b: free: 50%") == ("b", "free: 50%") and command.host_of("") == ("", "")


def test_labels_that_are_no_host_names() -> None:
    command = Command(("srun",), remote=("srun", "--label", "sh", "-c", "{command}"), labels={"0": "n1", "11": "n2"})
    assert command.on_hosts("echo 50%")[-1] == "echo 50%"
    assert command.host_of(" 0: text: more") == ("n1", "text: more") and command.host_of("11: ") == ("n2", "")
    other = "srun: error: Node failure on n2"
    assert command.host_of(other) == ("", other)


def test_deepspeed_on_one_host() -> None:
    here = get_backend("deepspeed").command(plan(Host(socket.gethostname(), (0,)), hostfile=Path("hosts")))
    assert here.remote is None and here.argv[0] == sys.executable and here.env[LAUNCH_ID] == "id7"
    there = get_backend("deepspeed").command(plan(Host("elsewhere", (0,)), hostfile=Path("hosts")))
    assert there.remote is not None and there.argv[0] == "pdsh"


def test_deepspeed_refuses_what_cannot_work() -> None:
    with pytest.raises(RecipeError, match="--backend deepspeed needs --hostfile"):
        get_backend("deepspeed").command(plan(Host("a", (0,))))
    with pytest.raises(RecipeError, match="localhost cannot be reached by the other hosts"):
        get_backend("deepspeed").command(plan(Host("localhost", (0,)), Host("b", (0,)), hostfile=Path("h")))


def test_slurm() -> None:
    hosts = (Host("n1", (0, 1)), Host("n3", (0, 1)))
    command = get_backend("slurm").command(plan(*hosts, accelerator="cpu", cpus_per_rank=4))
    assert command.argv[:3] == ("srun", "--nodes=2", "--nodelist=n1,n3") and "--kill-on-bad-exit=0" in command.argv
    assert {"--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=4", "--overlap"} <= {*command.argv}
    assert "--label" not in command.argv, "it would break a rank's report"
    before, _, env, folder = unpack(command.argv[-1])
    expected = f"{sys.executable} -u -m launch.slurm_task n1 29500 n1:2,n3:2 {sys.executable} -u /p/train.py r.yaml"
    assert os.fsdecode(b" ".join(before)) == f"{expected} --set a=1" and folder == os.fsencode(Path.cwd())
    assert env == {b"OMP_NUM_THREADS": b"1", LAUNCH_ID.encode(): b"id7", b"CUDA_VISIBLE_DEVICES": b"-1"}
    assert command.env == {}, "srun itself must not count as a process of the launch"
    ask = command.on_hosts("echo 50%")
    assert ask[-3:] == ["sh", "-c", "echo 50%"] and {"--ntasks=2", "--ntasks-per-node=1", "--label"} <= {*ask}
    assert command.host_of("1: yes") == ("n3", "yes")
    assert command.lost_host is not None
    lost = re.match(command.lost_host, "srun: error: Node failure on n3")
    assert lost is not None and lost[1] == "n3"


def test_slurm_on_gpus() -> None:
    command = get_backend("slurm").command(plan(Host("n1", (0, 1)), accelerator="gpu"))
    assert (
        not any("gpu" in part for part in command.argv[:-1])
        and b"CUDA_VISIBLE_DEVICES" not in unpack(command.argv[-1])[2]
    )
    with pytest.raises(RecipeError, match="--backend slurm starts equally many ranks on every node"):
        get_backend("slurm").command(plan(Host("n1", (0, 1)), Host("n2", (0,))))


def test_a_long_line_that_srun_broke() -> None:
    command = Command(("srun",), remote=("{command}",), labels={"0": "n1", "1": "n2"}, piece_bytes=8)
    output = "0: 12345678\n1: other\n0: 12345678\n0: 9\n0: next\nsrun: something\n01: 12345678\n01: \n01: x"
    assert command.lines_of("n1", output) == ["12345678123456789", "next"]
    assert command.lines_of("n2", output) == ["other", "12345678", "x"]


def test_torchrun_on_one_host() -> None:
    command = get_backend("torchrun").command(plan(Host("localhost", (0, "GPU-8f2a"))))
    expected = "--nnodes=1 --nproc-per-node=2 --max-restarts=0 --master-addr=localhost --master-port=29500 /p/train.py"
    assert command.argv[:4] == (sys.executable, "-u", "-m", "torch.distributed.run")
    assert shlex.join(command.argv[4:]) == f"{expected} r.yaml --set a=1" and command.remote is None
    assert command.env == {"OMP_NUM_THREADS": "1", LAUNCH_ID: "id7", "CUDA_VISIBLE_DEVICES": "0,GPU-8f2a"}


def test_torchrun_on_several_hosts() -> None:
    hosts = (Host("node-0", (0, 1)), Host("node-1", (0, 1)))
    given = plan(*hosts, node_rank=1, rendezvous=("a:29400", "job"), accelerator="cpu")
    command = get_backend("torchrun").command(given)
    meet = "--nnodes=2 --nproc-per-node=2 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=a:29400 --rdzv-id=job"
    assert shlex.join(command.argv[4:]).startswith(meet) and command.env["CUDA_VISIBLE_DEVICES"] == "-1"
    assert not given.leads and given.own_hosts == hosts[1:]


def test_a_launcher_on_every_host() -> None:
    hosts = (Host("a", (0, 1)), Host("b", (1,)))
    command = get_backend("deepspeed").command(plan(*hosts, hostfile=Path("hosts"), node_rank=1))
    assert command.argv[0] == sys.executable and command.argv[5] == "--node_rank=1" and command.remote is None
    assert world(command.argv) == {"a": [0, 1], "b": [1]} and command.env[LAUNCH_ID] == "id7"


def test_registry() -> None:
    assert set(BACKENDS) == {"local", "deepspeed", "slurm", "torchrun"}
    with pytest.raises(RecipeError, match=r"--backend lokal is unknown; did you mean local\? \(known: local"):
        get_backend("lokal")


def test_this_machine() -> None:
    assert is_this_machine("localhost") and is_this_machine(socket.gethostname())
    assert not is_this_machine("surely-not-here.example.org")


@pytest.mark.parametrize("name", BACKENDS)
def test_the_recipe_is_resolved_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launcher, which asks git once; every rank gets the file that it writes, and its sha256."""
    asked = []
    monkeypatch.setattr(resolve, "_git", lambda root, *what: asked.append(what) or "c0ffee")
    job = Allocation("1", ("n1",), 1, 0, 2) if name == "slurm" else None
    hostfile = tmp_path / "hosts"
    hostfile.write_text(f"{socket.gethostname()} slots=1\n")
    given = LaunchOptions(
        recipe="demo_connector", backend=name, accelerator="cpu", run_dir=str(tmp_path / "run"),
        hostfile=hostfile if name == "deepspeed" else None,
    )  # fmt: skip
    planned, resolved = build_plan(given, {}, job=job)
    file = write_resolved(resolved, planned.run_dir)
    command = get_backend(name).command(planned)
    assert [what[0] for what in asked] == ["rev-parse", "status"], "once for the commit, once for changes"
    argv = command.argv if command.arrives is None else command.arrives.argv
    assert argv[-4:] == (str(planned.script), str(file.path), "--sha256", file.sha256)
    assert hashlib.sha256(file.path.read_bytes()).hexdigest() == file.sha256
