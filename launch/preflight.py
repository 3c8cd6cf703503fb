"""Before any rank starts: does every host answer, and does it see the same files?

Without this a launch with one missing host looks healthy: ssh prints one line, and the ranks of the other hosts wait
half an hour for it at the rendezvous.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.backends import Command
from launch.plan import LaunchPlan
from pipeline.errors import ClusterError

TIMEOUT_SECONDS = 120.0
"""For all hosts together; one that does not answer is given up long before, by ssh's ConnectTimeout."""
_READY = "slt-host-ready"


def check_hosts(command: Command, plan: LaunchPlan) -> None:
    """Log in on every host of the plan at once and look for the interpreter, the project and the run directory.

    A command without ``remote`` runs on this machine alone; then there is nothing to ask.

    Raises:
        ClusterError: names each host that cannot take part and says why.
    """
    if command.remote is None:
        return
    with _marker(plan) as marker:
        output, errors = _ask(command, _questions(plan, marker))
    problems = []
    for host in plan.hosts:
        said = _lines_of(host.name, output)
        if _READY not in said:
            reason = "; ".join(_lines_of(host.name, errors) + said) or "no answer"
            problems.append(f"  {host.name}: {reason}")
    if problems:
        port = "" if plan.ssh_port is None else f"-p {plan.ssh_port} "
        raise ClusterError(
            f"{len(problems)} of {len(plan.hosts)} hosts cannot take part, nothing was started:\n"
            + "\n".join(problems)
            + f"\nEvery host must let you in without a password (try: ssh {port}-o BatchMode=yes HOST true) and see the"
            " same files under the same paths; leave a host out with --exclude HOST."
        )


def _questions(plan: LaunchPlan, marker: Path) -> str:
    """Shell text that prints `_READY`, or what is missing on the host."""
    wanted = {
        Path(sys.executable): f"has no {sys.executable}",
        plan.script: f"has no {plan.script}",
        marker: f"sees another {marker.parent.parent}: run_dir must be on storage that all hosts share",
    }
    tests = [f"! test -e {shlex.quote(str(path))}; then echo {shlex.quote(text)};" for path, text in wanted.items()]
    return f"if {' elif '.join(tests)} else echo {_READY}; fi"


def _ask(command: Command, shell: str) -> tuple[str, str]:
    """Standard output and errors of the shell text run on all hosts; each line begins with the host's name."""
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
    """A file in the run directory under a name no host has looked for before, so that no cache can know it."""
    path = plan.run_dir.absolute() / "logs" / f"hosts-{plan.launch_id}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


__all__ = ["check_hosts"]
