from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch import preflight
from launch.backends import Command
from launch.hostfile import Host
from launch.plan import LaunchPlan, plan_ranks
from launch.preflight import check_hosts
from pipeline.errors import ClusterError
from tests.source_tree import ROOT

HOSTS = (Host("a", (0,)), Host("b", (0,)))
# As pdsh does: the command on every host, its lines behind the host's name.
EVERYWHERE = 'for host in a b; do sh -c "$0" 2>&1 | sed "s/^/$host: /"; done'
ONE_MISSING = 'sh -c "$0" | sed "s/^/a: /"; echo "b: ssh: connect to host b port 22: No route to host" >&2; exit 255'


def plan(folder: Path) -> LaunchPlan:
    script = ROOT / "launch" / "train.py"
    return LaunchPlan(script, (), folder / "run", HOSTS, plan_ranks(HOSTS, "a", 1), "id7", ssh_port=2222)


def by(script: str) -> Command:
    return Command(argv=("true",), remote=("sh", "-c", script, "{command}"))


def test_hosts_that_see_everything(tmp_path: Path) -> None:
    check_hosts(by(EVERYWHERE), plan(tmp_path))
    assert not list((tmp_path / "run" / "logs").iterdir())


def test_nothing_to_ask_on_one_machine(tmp_path: Path) -> None:
    check_hosts(Command(argv=("true",)), plan(tmp_path))
    assert not (tmp_path / "run").exists()


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
    monkeypatch.setattr(preflight.sys, "executable", "/no/such python")
    with pytest.raises(ClusterError, match=r"2 of 2 hosts cannot take part(.|\n)*a: has no /no/such python"):
        check_hosts(by(EVERYWHERE), given)


def test_silent_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="  b: no answer"):
        check_hosts(by(f"({EVERYWHERE}) | grep -v '^b'"), plan(tmp_path))
    monkeypatch.setattr(preflight, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(ClusterError, match=r"1 of 2 hosts(.|\n)*  b: no answer"):
        check_hosts(by('sh -c "$0" | sed "s/^/a: /"; exec sleep 20'), plan(tmp_path))


def test_pdsh_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="/no/such/pdsh is not installed on this machine"):
        check_hosts(Command(argv=("true",), remote=("/no/such/pdsh", "{command}")), plan(tmp_path))
