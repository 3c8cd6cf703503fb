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
from typing import Any

from launch.backends import Command
from launch.carry import ARRIVE_SCRIPT, HostCommand, shell_line, shell_word
from launch.checks import CHECKS, READY
from launch.hostfile import Host
from launch.plan import LaunchPlan
from pipeline.config.load import PROJECT_ROOT
from pipeline.errors import ClusterError, RecipeError

TIMEOUT_SECONDS = 120.0
"""For all hosts together; ssh's ConnectTimeout gives up a silent host long before."""


def check_hosts(command: Command, plan: LaunchPlan) -> None:
    """Log in on all hosts of the plan at once and run `launch.checks.CHECKS` on each.

    A command without ``remote`` runs only on this machine.

    Raises:
        ClusterError: names each host that cannot take part and says why.
        RecipeError: the command itself is wrong, such as a port that is in use.
    """
    if command.remote is None:
        if len(plan.own_hosts) > 1:
            raise RecipeError(
                f"this backend starts ranks on this machine only, got {len(plan.hosts)} hosts; use deepspeed"
            )
        (host,) = plan.own_hosts
        reason = _reason(plan, host, {check.name: check.look(check.question(plan, None)) for check in CHECKS})
        if reason:
            fix = f"; correct {plan.hostfile}" if plan.hostfile is not None else ""
            raise ClusterError(f"{host.name}, this machine, {reason}, nothing was started{fix}")
        return
    with _marker(plan) as marker:
        output, errors = _ask(command, _questions(plan, marker))
    problems, others = [], []
    for host in plan.hosts:
        host_lines = command.lines_of(host.name, output)
        answers = next((line.removeprefix(READY) for line in host_lines if line.startswith(READY)), None)
        if answers is None:
            reason = "; ".join(command.lines_of(host.name, errors) + host_lines) or "no answer"
        else:
            try:
                reason = _reason(plan, host, json.loads(answers))
            except RecipeError as error:
                others.append(error)
                continue
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
    if others:
        raise others[0]


def _reason(plan: LaunchPlan, host: Host, answers: dict[str, Any]) -> str:
    """Why a host cannot take part; empty when it can. Raises RecipeError when the command is at fault."""
    for check in CHECKS:
        reason = check.judge(plan, host, answers[check.name])
        if reason and not check.blames_host:
            raise RecipeError(reason)
        if reason:
            return reason
    return ""


def _questions(plan: LaunchPlan, marker: Path) -> str:
    """Shell text that prints READY and the host's answers, or says what the host lacks to answer."""
    needed = {
        Path(sys.executable): f"has no {sys.executable}",
        ARRIVE_SCRIPT: f"has no {ARRIVE_SCRIPT}",
    }
    tests = [f"! test -e {shell_word(str(path))}; then echo {shell_word(text)};" for path, text in needed.items()]
    questions = {check.name: check.question(plan, marker) for check in CHECKS}
    argv = (sys.executable, "-m", "launch.checks", json.dumps(questions))
    return f"if {' elif '.join(tests)} else {shell_line(HostCommand(argv, folder=PROJECT_ROOT))}; fi"


def _ask(command: Command, shell: str) -> tuple[str, str]:
    """Run the shell text on all hosts; returns stdout and stderr, whose lines begin with a label."""
    argv = command.on_hosts(shell)
    try:
        result = subprocess.run(
            argv, env={**os.environ, **command.env}, timeout=TIMEOUT_SECONDS, check=False,
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ClusterError(f"{argv[0]} is not installed on this machine, and the other hosts need it") from error
    except subprocess.TimeoutExpired as error:
        return _text(error.stdout), _text(error.stderr)
    return result.stdout, result.stderr


def _text(captured: bytes | str | None) -> str:
    return captured.decode(errors="replace") if isinstance(captured, bytes) else captured or ""


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
