from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.backends import BACKENDS, get_backend
from launch.backends.deepspeed import is_this_machine, pdsh_argument
from launch.hostfile import Host
from launch.plan import LAUNCH_ID, LaunchPlan, plan_ranks
from pipeline.errors import RecipeError


def plan(*hosts: Host, **changes: object) -> LaunchPlan:
    values: dict[str, object] = {
        "script": Path("/p/train.py"), "arguments": ("r.yaml", "--set", "a=1"), "run_dir": Path("/runs/x"),
        "hosts": hosts, "ranks": plan_ranks(hosts, hosts[0].name, 29500), "launch_id": "id7",
        "env": {"OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    return LaunchPlan(**{**values, **changes})  # type: ignore[arg-type]


def test_local() -> None:
    command = get_backend("local").command(plan(Host("localhost", (0, 1))))
    expected = f"-m deepspeed.launcher.runner --hostfile {os.devnull} --num_gpus 2 --master_port 29500 --no_local_rank"
    assert command.argv[0] == sys.executable
    assert shlex.join(command.argv[1:]) == f"{expected} --log_level critical /p/train.py r.yaml --set a=1"
    assert command.env == {"OMP_NUM_THREADS": "1", LAUNCH_ID: "id7"} and command.remote is None


def test_local_keeps_to_the_visible_devices() -> None:
    command = get_backend("local").command(plan(Host("localhost", (2, 5)), visible_devices=True))
    assert "localhost:2,5" in command.argv and "--num_gpus" not in command.argv


def test_local_refuses_hosts() -> None:
    with pytest.raises(RecipeError, match="--backend local runs on this machine only, got 2 hosts"):
        get_backend("local").command(plan(Host("a", (0,)), Host("b", (0,))))


def test_deepspeed_on_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F cfg")
    hosts = (Host("a", (0, 1)), Host("b", (1,)))
    command = get_backend("deepspeed").command(plan(*hosts, hostfile=Path("hosts"), ssh_port=2222))
    text = shlex.join(command.argv[1:])
    assert "--hostfile hosts --include a:0,1@b:1 --master_addr a --master_port 29500 --no_ssh_check" in text
    assert text.endswith("/p/train.py r.yaml --set a=1") and "--force_multi" not in text
    env_file = Path("/runs/x/logs/launch.env")
    assert command.files == {env_file: f"OMP_NUM_THREADS=1\n{LAUNCH_ID}=id7\n"}
    assert command.env["DS_ENV_FILE"] == str(env_file) and LAUNCH_ID not in command.env
    assert command.env["PDSH_SSH_ARGS_APPEND"].startswith("-F cfg -p 2222 -o ServerAliveInterval=")
    assert "-o ConnectTimeout=15 -o BatchMode=yes" in command.env["PDSH_SSH_ARGS_APPEND"]
    assert command.lost_host is not None
    lost = re.match(command.lost_host, "pdsh@here: node-1.example: ssh exited with exit code 255")
    assert lost is not None and lost[1] == "node-1.example"
    assert not re.match(command.lost_host, "pdsh@here: b: ssh exited with exit code 247")
    assert command.remote is not None and "a,b" in command.remote and command.remote[-1] == "{command}"


def test_deepspeed_on_one_host() -> None:
    here = get_backend("deepspeed").command(plan(Host(socket.gethostname(), (0,)), hostfile=Path("hosts")))
    assert here.remote is None and "--force_multi" not in here.argv and here.env[LAUNCH_ID] == "id7"
    there = get_backend("deepspeed").command(plan(Host("elsewhere", (0,)), hostfile=Path("hosts")))
    assert there.remote is not None and "--force_multi" in there.argv


def test_deepspeed_refuses_what_cannot_work() -> None:
    with pytest.raises(RecipeError, match="--backend deepspeed needs --hostfile"):
        get_backend("deepspeed").command(plan(Host("a", (0,))))
    with pytest.raises(RecipeError, match="localhost cannot be reached by the other hosts"):
        get_backend("deepspeed").command(plan(Host("localhost", (0,)), Host("b", (0,)), hostfile=Path("h")))


def test_registry() -> None:
    assert set(BACKENDS) >= {"local", "deepspeed"}
    with pytest.raises(RecipeError, match=r"--backend lokal is unknown; did you mean local\? \(known: local"):
        get_backend("lokal")


def test_this_machine() -> None:
    assert is_this_machine("localhost") and is_this_machine(socket.gethostname())
    assert not is_this_machine("surely-not-here.example.org")


def through_pdsh(arguments: list[str]) -> list[str]:
    """What DeepSpeed 0.19.8's PDSHRunner does to user arguments, then the remote shell."""
    passed = ['"{}"'.format(a.replace('"', '\\"')) if " " in a else a for a in arguments]
    script = "import sys; sys.stdout.write(chr(0).join(sys.argv[1:]))"
    line = f"{shlex.quote(sys.executable)} -S -E -c {shlex.quote(script)} {' '.join(passed)}"
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout.split("\0")


@pytest.mark.parametrize(
    "text", ["a=1", "a=[1,2]", 'p="{video} Say: $HOME `id` \\"x\\" it\'s"', "a='b'", "x;y", "a=$B", "\\ "]
)
def test_arguments_arrive_unchanged(text: str) -> None:
    assert through_pdsh([pdsh_argument(text), pdsh_argument("end")]) == [text, "end"]


@given(st.lists(st.text(alphabet="ab \"'$`\\;&|<>*?(){}[]#~!=,", min_size=1, max_size=8), min_size=12, max_size=12))
def test_arguments_of_any_kind_arrive_unchanged(texts: list[str]) -> None:
    assert through_pdsh([pdsh_argument(text) for text in texts]) == texts


@pytest.mark.parametrize("text", ["a=50%", "a\nb"])
def test_arguments_pdsh_cannot_carry(text: str) -> None:
    with pytest.raises(RecipeError, match="cannot be passed to other hosts by pdsh"):
        pdsh_argument(text)
