"""Checks before any rank starts that every host answers, is like the others and sees the same files.

Without them, a launch with a missing host looks healthy: ssh prints one line, and the ranks of the other hosts
wait for it at the rendezvous for half an hour.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.backends import Command
from launch.carry import ARRIVE_SCRIPT, HostCommand, shell_line, shell_word
from launch.checks import CHECKS, READY
from launch.checks.__main__ import looked
from launch.checks.base import Launch
from launch.hostfile import Host
from launch.plan import LaunchPlan
from pipeline.config.load import PROJECT_ROOT
from pipeline.config.schema import Recipe
from pipeline.errors import ClusterError, RecipeError

TIMEOUT_SECONDS = 120.0
"""For all hosts together; ssh's ConnectTimeout gives up a silent host long before."""
Answers = dict[str, dict[str, Any]]
"""Of one host: check -> ``{"answer": ...}`` or ``{"problem": ...}``."""


class UnfitHostsError(ClusterError):
    """Hosts that cannot take part; the message says why."""

    def __init__(self, text: str, hosts: Iterable[str]) -> None:
        super().__init__(text)
        self.hosts = tuple(hosts)


def check_hosts(command: Command, plan: LaunchPlan, recipe: Recipe) -> None:
    """Log in on all hosts of the plan at once and run `launch.checks.CHECKS` on each.

    A command without ``remote`` runs only on this machine.

    Raises:
        UnfitHostsError: names each host that cannot take part and says why.
        ClusterError: this machine cannot take part, or cannot reach the others.
        RecipeError: the command itself is wrong, such as a port that is in use.
    """
    launch = Launch(plan, recipe)
    if command.remote is None:
        if len(plan.own_hosts) > 1:
            raise RecipeError(
                f"this backend starts ranks on this machine only, got {len(plan.hosts)} hosts; use deepspeed"
            )
        (host,) = plan.own_hosts
        reasons = _judged(launch, {host.name: {c.name: looked(c, c.question(launch)) for c in CHECKS}})
        if reasons:
            fix = f"; correct {plan.hostfile}" if plan.hostfile is not None else ""
            raise ClusterError(f"{host.name}, this machine, {'; '.join(reasons[host.name])}, nothing was started{fix}")
        return
    with _marker(plan) as marker:
        launch = replace(launch, marker=marker)
        output, errors = ask(command, _questions(launch), TIMEOUT_SECONDS)
        answers, reasons = {}, dict[str, list[str]]()
        for host in plan.hosts:
            said, complained = (command.lines_of(host.name, text) for text in (output, errors))
            answers[host.name] = _answers(said)
            if text := _silence(answers[host.name], complained, said):
                reasons[host.name] = [text]
                del answers[host.name]
        reasons |= _judged(launch, answers, blamed=bool(reasons))
    if reasons:
        raise UnfitHostsError(_refusal(plan, reasons), [host.name for host in plan.hosts if host.name in reasons])


def _judged(launch: Launch, answers: Mapping[str, Answers], blamed: bool = False) -> dict[str, list[str]]:
    """Why hosts cannot take part, in the order of the checks.

    Raises:
        RecipeError: the command is at fault, and no host is; ``blamed``: another one is already.
    """
    hosts = {host.name: host for host in launch.plan.hosts}
    reasons: dict[str, list[str]] = {}
    faults: list[str] = []
    for check in CHECKS:
        replies = {name: answer[check.name] for name, answer in answers.items()}
        found = {name: reply["problem"] for name, reply in replies.items() if "problem" in reply}
        given = {name: reply["answer"] for name, reply in replies.items() if "answer" in reply}
        found |= {name: check.judge(launch, hosts[name], answer) for name, answer in given.items()}
        for name, reason in (check.compare(launch, given) if len(given) > 1 else {}).items():
            found[name] = found[name] or reason
        for name, reason in found.items():
            if reason and check.blames_host:
                reasons.setdefault(name, []).append(reason)
            elif reason:
                faults.append(reason)
    if faults and not reasons and not blamed:
        raise RecipeError(faults[0])
    return reasons


def _refusal(plan: LaunchPlan, reasons: Mapping[str, list[str]]) -> str:
    port = "" if plan.ssh_port is None else f"-p {plan.ssh_port} "
    enter = f"let you in without a password (try: ssh {port}-o BatchMode=yes HOST true) and " if plan.hostfile else ""
    return (
        f"{len(reasons)} of {len(plan.hosts)} hosts cannot take part, nothing was started:\n"
        + "\n".join(grouped(plan.hosts, reasons))
        + f"\nEvery host must {enter}see the same files under the same paths; leave a host out with --exclude HOST, all"
        " of these with --exclude-bad."
    )


def grouped(hosts: Iterable[Host], reasons: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """One line for every reason, with all hosts that share it."""
    names, told = [host.name for host in hosts], dict[str, list[str]]()
    for name in names:
        for reason in reasons.get(name, ()):
            told.setdefault(reason, []).append(name)
    for reason, who in told.items():
        yield f"  {f'all {len(names)} hosts' if len(who) == len(names) > 1 else ', '.join(who)}: {reason}"


def _questions(launch: Launch) -> str:
    """Shell text that prints READY and the host's answers, or says what the host lacks to answer."""
    needed = {
        Path(sys.executable): f"has no {sys.executable}",
        ARRIVE_SCRIPT: f"has no {ARRIVE_SCRIPT}",
    }
    tests = [f"! test -e {shell_word(str(path))}; then echo {shell_word(text)};" for path, text in needed.items()]
    questions = {check.name: check.question(launch) for check in CHECKS}
    argv = (sys.executable, "-m", "launch.checks", json.dumps(questions))
    return f"if {' elif '.join(tests)} else {shell_line(HostCommand(argv, folder=PROJECT_ROOT))}; fi"


def _answers(lines: Iterable[str]) -> Answers:
    """What a host has answered so far."""
    answers = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == READY:
            name, _, content = rest.partition(" ")
            with suppress(ValueError):  # the line was not finished in time
                answers[name] = json.loads(content)
    return answers


def _silence(answers: Answers, errors: list[str], output: list[str]) -> str:
    """What a host says instead of an answer to every check; empty if it has answered all."""
    open_checks = [check.name for check in CHECKS if check.name not in answers]
    if not open_checks:
        return ""
    others = [line for line in [*errors, *output] if line.strip() and not line.startswith(READY)]
    if any(line.startswith("Traceback") for line in others):  # its last line says it
        others = others[-1:]
    said = "; ".join(others) or "no answer"
    return f"{said} (asked for {open_checks[0]}, which may wait for storage or a driver)" if answers else said


def ask(command: Command, shell: str, seconds: float) -> tuple[str, str]:
    """Run the shell text on all hosts, at most so long; returns stdout and stderr, whose lines begin with a label.

    Raises:
        ClusterError: the program that reaches the hosts is not installed here.
    """
    argv = command.on_hosts(shell)
    try:
        process = subprocess.Popen(
            argv, env={**os.environ, **command.env}, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ClusterError(f"{argv[0]} is not installed on this machine, and the other hosts need it") from error
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        return process.communicate()
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a command with its connections to the hosts; nothing if it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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


__all__ = ["UnfitHostsError", "ask", "check_hosts", "grouped"]
