from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from launch import preflight
from launch.backends import Command
from launch.hostfile import Host
from launch.options import free_port
from launch.plan import LaunchPlan, plan_ranks
from launch.preflight import UnfitHostsError, check_hosts
from pipeline.config.load import load_recipe
from pipeline.errors import ClusterError, RecipeError
from tests.source_tree import ROOT
from tests.unit.shards.shard_sets import write_videos

RECIPE = load_recipe("demo_connector")
HOSTS = (Host("a", (0,)), Host("b", (0,)))
# As pdsh does: the command on every host, its lines behind the host's name.
EVERYWHERE = 'for host in a b; do sh -c "$0" 2>&1 | sed "s/^/$host: /"; done'
ONE_MISSING = 'sh -c "$0" | sed "s/^/a: /"; echo "b: ssh: connect to host b port 22: No route to host" >&2; exit 255'


def plan(folder: Path) -> LaunchPlan:
    script = ROOT / "launch" / "train.py"
    ranks = plan_ranks(HOSTS, "a", free_port())
    return LaunchPlan(script, (), folder / "run", HOSTS, ranks, "id7", hostfile=Path("hosts"), ssh_port=2222)


def by(script: str) -> Command:
    return Command(argv=("true",), remote=("sh", "-c", script, "{command}"))


def test_hosts_that_see_everything(tmp_path: Path) -> None:
    check_hosts(by(EVERYWHERE), plan(tmp_path), RECIPE)
    assert not list((tmp_path / "run" / "logs").iterdir())


def here(folder: Path, **changes: object) -> LaunchPlan:
    host = (Host("localhost", (0, 1)),)
    ranks = plan_ranks(host, "127.0.0.1", free_port())
    return replace(plan(folder), hosts=host, ranks=ranks, **changes)  # type: ignore[arg-type]


def test_no_files_to_look_for_on_one_machine(tmp_path: Path) -> None:
    check_hosts(Command(argv=("true",)), here(tmp_path), RECIPE)
    assert not (tmp_path / "run").exists()


def test_a_backend_that_reaches_no_other_host(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this machine only, got 2 hosts; use deepspeed"):
        check_hosts(Command(argv=("true",)), plan(tmp_path), RECIPE)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = f"port {port} of 127.0.0.1, where the ranks meet, is in use, .* Choose another port with --master-port"
        given = here(tmp_path)
        with pytest.raises(RecipeError, match=text):
            check_hosts(
                Command(argv=("true",)), replace(given, ranks=plan_ranks(given.hosts, "127.0.0.1", port)), RECIPE
            )
        for master in ("a", "elsewhere"):
            given = replace(plan(tmp_path), ranks=plan_ranks(HOSTS, master, port))
            with pytest.raises(RecipeError, match=f"port {port} of a,") if master == "a" else nullcontext():
                check_hosts(by(EVERYWHERE), given, RECIPE)


def test_a_job_needs_no_ssh(tmp_path: Path) -> None:
    with pytest.raises(UnfitHostsError, match=r"  b: .*No route(.|\n)*\nEvery host must see the same files under"):
        check_hosts(by(ONE_MISSING), replace(plan(tmp_path), hostfile=None), RECIPE)


def test_hosts_with_fewer_devices_than_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: one'\necho 'GPU 1: two'")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hosts = (Host("a", (0, 1)), Host("b", (0, 1, 2)))
    given = replace(plan(tmp_path), hosts=hosts, ranks=plan_ranks(hosts, "a", free_port()))
    check_hosts(by(EVERYWHERE), given, RECIPE)
    with pytest.raises(ClusterError, match=r"1 of 2 hosts(.|\n)*  b: has 2 GPUs, but the hostfile gives it 3 ranks"):
        check_hosts(by(EVERYWHERE), replace(given, needs_gpus=True), RECIPE)
    smi.write_text("#!/bin/sh\nexit 9")
    mine = here(tmp_path, needs_gpus=True, hostfile=Path("hosts"))
    text = "localhost, this machine, has no GPU, but the hostfile gives it 2 ranks, nothing was started; correct hosts"
    with pytest.raises(ClusterError, match=text):
        check_hosts(Command(argv=("true",)), mine, RECIPE)


def test_an_unreachable_host_is_named_with_ssh_s_reason(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="1 of 2 hosts cannot take part, nothing was started") as error:
        check_hosts(by(ONE_MISSING), plan(tmp_path), RECIPE)
    text = str(error.value)
    assert "\n  b: ssh: connect to host b port 22: No route to host\n" in text and "\n  a:" not in text
    assert "ssh -p 2222 -o BatchMode=yes HOST true" in text and error.value.exit_code == 3


def test_what_a_host_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = plan(tmp_path)
    with pytest.raises(ClusterError, match=r"all 2 hosts: has no /no/such/train\.py"):
        check_hosts(by(EVERYWHERE), replace(given, script=Path("/no/such/train.py")), RECIPE)
    other = f"rm {tmp_path}/run/logs/hosts-id7; {EVERYWHERE}"
    with pytest.raises(ClusterError, match=f"all 2 hosts: sees another {tmp_path}/run: run_dir must be on storage"):
        check_hosts(by(other), given, RECIPE)
    (tmp_path / "gone").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "gone")
        with pytest.raises(ClusterError, match=f"has no folder {tmp_path}/gone"):
            check_hosts(by(f"rmdir {tmp_path}/gone; {EVERYWHERE}"), given, RECIPE)
    monkeypatch.setattr(preflight.sys, "executable", "/no/such python")
    with pytest.raises(
        ClusterError, match=r"2 of 2 hosts cannot take part(.|\n)*  all 2 hosts: has no /no/such python"
    ):
        check_hosts(by(EVERYWHERE), given, RECIPE)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_silent_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="  b: no answer"):
        check_hosts(by(f"({EVERYWHERE}) | grep -v '^b'"), plan(tmp_path), RECIPE)
    monkeypatch.setattr(preflight, "TIMEOUT_SECONDS", 2.0)  # a busy machine needs a second to start the others
    with pytest.raises(ClusterError, match=r"1 of 2 hosts(.|\n)*  b: no answer"):
        check_hosts(
            by(f'sh -c "$0" | sed "s/^/a: /"; sleep 20 & echo $! >{tmp_path}/pid; wait'), plan(tmp_path), RECIPE
        )
    assert not runs(int((tmp_path / "pid").read_text())), "its connections end with it"


def test_pdsh_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="/no/such/pdsh is not installed on this machine"):
        check_hosts(Command(argv=("true",), remote=("/no/such/pdsh", "{command}")), plan(tmp_path), RECIPE)


SHIFTED = """
import time
real = time.time
time.time = lambda: real() - 100
"""


def test_one_host_that_differs_from_the_others(tmp_path: Path) -> None:
    """Another version of a package, another clock and another shard, each only on host b; all are told at once."""
    other = tmp_path / "other"
    (other / "transformers-0.1.dist-info").mkdir(parents=True)
    (other / "transformers-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 0.1\n"
    )
    (other / "sitecustomize.py").write_text(SHIFTED)
    folder = tmp_path / "shards"
    write_videos(folder, [b"x" * 900] * 4, [3] * 4, per_shard=2)
    shutil.copy(folder / "train-000001.tar", tmp_path / "kept")
    recipe = load_recipe(
        "demo_connector", [f"data.train=[{{shards: {folder}}}]", "data.eval=[]", "train.eval_every_steps=0"]
    )
    script = (
        'sh -c "$0" 2>&1 | sed "s/^/a: /"; '
        f"printf z | dd of={folder}/train-000001.tar bs=1 seek=5 conv=notrunc 2>/dev/null; "
        f'PYTHONPATH={other} sh -c "$0" 2>&1 | sed "s/^/b: /"; cp {tmp_path}/kept {folder}/train-000001.tar'
    )
    with pytest.raises(UnfitHostsError) as caught:
        check_hosts(by(script), plan(tmp_path), recipe)
    lines = str(caught.value).splitlines()
    assert caught.value.hosts == ("b",) and lines[0].startswith("1 of 2 hosts cannot take part")
    here = importlib.metadata.version("transformers")
    assert lines[1] == (
        f"  b: has transformers 0.1, the others {here}; bring its checkout and environment to the state of the others"
    )
    assert re.fullmatch(r"  b: has a clock \d+ s behind this machine's; set it by NTP \(chronyc makestep\)", lines[2])
    assert lines[3] == f"  b: has another {folder} than the others; copy it again, or correct its mount"
    assert lines[-1].endswith("leave a host out with --exclude HOST, all of these with --exclude-bad.")


def test_a_check_that_does_not_answer_is_named(tmp_path: Path) -> None:
    cut = "sh -c \"$0\" | sed 's/^/b: /' | sed '/inputs/,$d'"
    script = f'sh -c "$0" | sed "s/^/a: /"; {cut}'
    text = r"1 of 2 hosts(.|\n)*  b: no answer \(asked for inputs, which may wait for storage or a driver\)"
    with pytest.raises(UnfitHostsError, match=text):
        check_hosts(by(script), plan(tmp_path), RECIPE)
    broken = 'sh -c "$0" | sed "s/^/a: /"; echo "b: Traceback (most recent call last):" >&2; echo "b:   x" >&2'
    with pytest.raises(UnfitHostsError, match=r"hosts.*\n  b: NameError: y\n"):
        check_hosts(by(f'{broken}; echo "b: NameError: y" >&2'), plan(tmp_path), RECIPE)
    torn = f'sh -c "$0" | sed "s/^/a: /"; {cut}; echo "b: slt-host-ready inputs {{"'
    with pytest.raises(UnfitHostsError, match="  b: no answer"):
        check_hosts(by(torn), plan(tmp_path), RECIPE)


def test_a_check_that_fails_refuses_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.checks.resources.existing_parent", lambda path: 1 / 0)
    text = "localhost, this machine, resources cannot be checked: ZeroDivisionError: division by zero, nothing was"
    with pytest.raises(ClusterError, match=text):
        check_hosts(Command(argv=("true",)), here(tmp_path), RECIPE)
