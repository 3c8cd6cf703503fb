from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from launch import preflight
from launch.backends import Command
from launch.hostfile import Host
from launch.options import free_port
from launch.plan import LaunchPlan, plan_ranks
from launch.preflight import check_hosts
from pipeline.errors import ClusterError, RecipeError
from tests.source_tree import ROOT

HOSTS = (Host("a", (0,)), Host("b", (0,)))
# As pdsh does: the command on every host, its lines behind the host's name.
EVERYWHERE = 'for host in a b; do sh -c "$0" 2>&1 | sed "s/^/$host: /"; done'
ONE_MISSING = 'sh -c "$0" | sed "s/^/a: /"; echo "b: ssh: connect to host b port 22: No route to host" >&2; exit 255'


def plan(folder: Path) -> LaunchPlan:
    script = ROOT / "launch" / "train.py"
    ranks = plan_ranks(HOSTS, "a", free_port())
    return LaunchPlan(script, (), folder / "run", HOSTS, ranks, "id7", ssh_port=2222)


def by(script: str) -> Command:
    return Command(argv=("true",), remote=("sh", "-c", script, "{command}"))


def test_hosts_that_see_everything(tmp_path: Path) -> None:
    check_hosts(by(EVERYWHERE), plan(tmp_path))
    assert not list((tmp_path / "run" / "logs").iterdir())


def here(folder: Path, **changes: object) -> LaunchPlan:
    host = (Host("localhost", (0, 1)),)
    ranks = plan_ranks(host, "127.0.0.1", free_port())
    return replace(plan(folder), hosts=host, ranks=ranks, **changes)  # type: ignore[arg-type]


def test_no_files_to_look_for_on_one_machine(tmp_path: Path) -> None:
    check_hosts(Command(argv=("true",)), here(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_backend_that_reaches_no_other_host(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this machine only, got 2 hosts; use deepspeed"):
        check_hosts(Command(argv=("true",)), plan(tmp_path))


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = f"port {port} of 127.0.0.1, where the ranks meet, is in use, .* Choose another port with --master-port"
        given = here(tmp_path)
        with pytest.raises(RecipeError, match=text):
            check_hosts(Command(argv=("true",)), replace(given, ranks=plan_ranks(given.hosts, "127.0.0.1", port)))
        for master in ("a", "elsewhere"):
            given = replace(plan(tmp_path), ranks=plan_ranks(HOSTS, master, port))
            with pytest.raises(RecipeError, match=f"port {port} of a,") if master == "a" else nullcontext():
                check_hosts(by(EVERYWHERE), given)


def test_hosts_with_fewer_devices_than_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: one'\necho 'GPU 1: two'")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hosts = (Host("a", (0, 1)), Host("b", (0, 1, 2)))
    given = replace(plan(tmp_path), hosts=hosts, ranks=plan_ranks(hosts, "a", free_port()))
    check_hosts(by(EVERYWHERE), given)
    with pytest.raises(ClusterError, match=r"1 of 2 hosts(.|\n)*  b: has 2 GPUs, but the hostfile gives it 3 ranks"):
        check_hosts(by(EVERYWHERE), replace(given, needs_gpus=True))
    smi.write_text("#!/bin/sh\nexit 9")
    mine = here(tmp_path, needs_gpus=True, hostfile=Path("hosts"))
    text = "localhost, this machine, has no GPU, but the hostfile gives it 2 ranks, nothing was started; correct hosts"
    with pytest.raises(ClusterError, match=text):
        check_hosts(Command(argv=("true",)), mine)


def test_an_unreachable_host_is_named_with_ssh_s_reason(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="1 of 2 hosts cannot take part, nothing was started") as error:
        check_hosts(by(ONE_MISSING), plan(tmp_path))
    text = str(error.value)
    assert "\n  b: ssh: connect to host b port 22: No route to host\n" in text and "\n  a:" not in text
    assert "ssh -p 2222 -o BatchMode=yes HOST true" in text and error.value.exit_code == 3


def test_what_a_host_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = plan(tmp_path)
    with pytest.raises(ClusterError, match=r"a: has no /no/such/train\.py"):
        check_hosts(by(EVERYWHERE), replace(given, script=Path("/no/such/train.py")))
    other = f"rm {tmp_path}/run/logs/hosts-id7; {EVERYWHERE}"
    with pytest.raises(ClusterError, match=f"b: sees another {tmp_path}/run: run_dir must be on storage"):
        check_hosts(by(other), given)
    (tmp_path / "gone").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "gone")
        with pytest.raises(ClusterError, match=f"has no folder {tmp_path}/gone"):
            check_hosts(by(f"rmdir {tmp_path}/gone; {EVERYWHERE}"), given)
    monkeypatch.setattr(preflight.sys, "executable", "/no/such python")
    with pytest.raises(ClusterError, match=r"2 of 2 hosts cannot take part(.|\n)*a: has no /no/such python"):
        check_hosts(by(EVERYWHERE), given)


def test_silent_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="  b: no answer"):
        check_hosts(by(f"({EVERYWHERE}) | grep -v '^b'"), plan(tmp_path))
    monkeypatch.setattr(preflight, "TIMEOUT_SECONDS", 2.0)  # a busy machine needs a second to start the others
    with pytest.raises(ClusterError, match=r"1 of 2 hosts(.|\n)*  b: no answer"):
        check_hosts(by('sh -c "$0" | sed "s/^/a: /"; exec sleep 20'), plan(tmp_path))


def test_pdsh_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="/no/such/pdsh is not installed on this machine"):
        check_hosts(Command(argv=("true",), remote=("/no/such/pdsh", "{command}")), plan(tmp_path))
