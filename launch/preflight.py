"""Checks before any rank starts that every host answers and sees the same files.

Without this check, a launch with a missing host looks healthy: ssh prints one line, and the ranks of the other hosts
wait for it at the rendezvous for half an hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.backends import Command
from launch.carry import ARRIVE_SCRIPT, HostCommand, shell_line, shell_word
from launch.devices import READY, listed_devices, port_in_use
from launch.hostfile import Host
from launch.plan import LaunchPlan
from pipeline.config.load import PROJECT_ROOT
from pipeline.errors import ClusterError, RecipeError

TIMEOUT_SECONDS = 120.0
"""For all hosts together; ssh's ConnectTimeout gives up a silent host long before."""


def check_hosts(command: Command, plan: LaunchPlan) -> None:
    """Log in on all hosts of the plan at once and check interpreter, project, run directory, devices and port.

    A command without ``remote`` runs only on this machine, whose files need no check.

    Raises:
        ClusterError: names each host that cannot take part and says why.
        RecipeError: the port where the ranks meet is in use.
    """
    if command.remote is None:
        return _check_this_machine(plan)
    with _marker(plan) as marker:
        output, errors = _ask(command, _questions(plan, marker))
    problems, busy = [], False
    for host in plan.hosts:
        said = _lines_of(host.name, output)
        found = next((line.split() for line in said if line.startswith(READY)), None)
        if found is None:
            reason = "; ".join(_lines_of(host.name, errors) + said) or "no answer"
        else:
            reason = _too_few(plan, host, int(found[1]))
            busy |= found[2:] == ["busy"] and host.name == plan.master_addr
        if reason:
            problems.append(f"  {host.name}: {reason}")
    if problems:
        port = "" if plan.ssh_port is None else f"-p {plan.ssh_port} "
        raise ClusterError(
            f"{len(problems)} of {len(plan.hosts)} hosts cannot take part, nothing was started:\n"
            + "\n".join(problems)
            + f"\nEvery host must let you in without a password (try: ssh {port}-o BatchMode=yes HOST true) and see the"
            " same files under the same paths; leave a host out with --exclude HOST."
        )
    if busy:
        raise _busy(plan)


def _check_this_machine(plan: LaunchPlan) -> None:
    (host,) = plan.hosts
    if plan.hostfile is not None and (reason := _too_few(plan, host, listed_devices())):
        raise ClusterError(f"{host.name}, this machine, {reason}, nothing was started; correct {plan.hostfile}")
    if port_in_use(plan.master_port):
        raise _busy(plan)


def _busy(plan: LaunchPlan) -> RecipeError:
    return RecipeError(
        f"port {plan.master_port} of {plan.master_addr}, where the ranks meet, is in use, perhaps by another run; "
        "nothing was started. Choose another port with --master-port"
    )


def _too_few(plan: LaunchPlan, host: Host, listed: int) -> str:
    """Message if a host has too few devices for its ranks; empty if it has enough."""
    missing = [device for device in host.devices if isinstance(device, int) and device >= listed]
    if not plan.needs_gpus or not missing:
        return ""
    return f"has {listed or 'no'} GPU{'s' if listed > 1 else ''}, but the hostfile gives it {host.slots} ranks"


def _questions(plan: LaunchPlan, marker: Path) -> str:
    """Shell text that prints READY, devices and port as `launch.devices` does, or what is missing on the host."""
    wanted = {
        Path(sys.executable): f"has no {sys.executable}",
        ARRIVE_SCRIPT: f"has no {ARRIVE_SCRIPT}",
    }
    tests = [f"! test -e {shell_word(str(path))}; then echo {shell_word(text)};" for path, text in wanted.items()]
    files = {
        str(plan.script): f"has no {plan.script}",
        str(Path.cwd()): f"has no folder {Path.cwd()}",
        str(marker): f"sees another {marker.parent.parent}: run_dir must be on storage that all hosts share",
    }
    argv = (sys.executable, "-m", "launch.devices", str(plan.master_port), json.dumps(files))
    return f"if {' elif '.join(tests)} else {shell_line(HostCommand(argv, folder=PROJECT_ROOT))}; fi"


def _ask(command: Command, shell: str) -> tuple[str, str]:
    """Run the shell text on all hosts; returns stdout and stderr, whose lines begin with the host's name."""
    assert command.remote is not None
    argv = [shell if part == "{command}" else part for part in command.remote]
    try:
        done = subprocess.run(
            argv, env={**os.environ, **command.env}, timeout=TIMEOUT_SECONDS, check=False,
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ClusterError(f"{argv[0]} is not installed on this machine, and the other hosts need it") from error
    except subprocess.TimeoutExpired as error:
        return _text(error.stdout), _text(error.stderr)
    return done.stdout, done.stderr


def _text(captured: bytes | str | None) -> str:
    return captured.decode(errors="replace") if isinstance(captured, bytes) else captured or ""


def _lines_of(host: str, text: str) -> list[str]:
    return [line.removeprefix(f"{host}: ") for line in text.splitlines() if line.startswith(f"{host}: ")]


@contextmanager
def _marker(plan: LaunchPlan) -> Iterator[Path]:
    """A file in the run directory with a new name, which no host can have cached."""
    path = plan.run_dir.absolute() / "logs" / f"hosts-{plan.launch_id}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


__all__ = ["check_hosts"]
