"""Backends turn a `LaunchPlan` into one command and do nothing else; `launch/supervise.py` runs it.

Adding one: a module with ``command(plan) -> Command`` and a line in `BACKENDS`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

from launch.carry import HostCommand
from launch.plan import LaunchPlan
from pipeline.config.names import nearest
from pipeline.errors import RecipeError

BACKENDS = {
    "local": "launch.backends.local",
    "deepspeed": "launch.backends.deepspeed",
    "slurm": "launch.backends.slurm",
    "torchrun": "launch.backends.torchrun",
}
"""Name -> module."""
_LABEL = re.compile(r" *(\S+): ?")  # pdsh writes `name: text`, srun ` 0: text`


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start on this machine; it starts the ranks."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    """Set on top of the current environment."""
    arrives: HostCommand | None = None
    """The command that every host then runs; None if that is ``argv`` itself, on this machine."""
    remote: tuple[str, ...] | None = None
    """Runs a shell line, in place of ``{command}`` (see `on_hosts`), once on every host of the ranks. Each line of its
    output begins with a label (see `host_of`). None if every rank that this command starts is on this machine."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label -> host, for the output of ``remote``; empty if the labels are the hosts' names."""
    piece_bytes: int | None = None
    """Longest piece of a line that ``remote`` carries whole; the rest follows as a line with the same label."""
    percent_is_special: bool = False
    """Whether ``remote`` replaces ``%h`` and the like, as pdsh does."""
    lost_host: str | None = None
    """Regular expression of the output line that reports a lost connection to a host; group 1 is the host's name."""

    def on_hosts(self, line: str) -> list[str]:
        """The arguments that run a shell line (`launch.carry.shell_line`) once on every host of the ranks."""
        assert self.remote is not None, "every rank is on this machine"
        line = line.replace("%", "%%") if self.percent_is_special else line
        return [line if part == "{command}" else part for part in self.remote]

    def host_of(self, line: str) -> tuple[str, str]:
        """A line of output of `on_hosts` -> the host that wrote it and what it wrote; ``""`` if no host did."""
        match = _LABEL.match(line)
        if match is None:
            return "", line
        host = self.labels.get(match[1].lstrip("0") or "0", "") if self.labels else match[1]
        return (host, line[match.end() :]) if host else ("", line)

    def lines_of(self, host: str, output: str) -> list[str]:
        """The lines of one host in the whole output of `on_hosts`, without labels and in one piece each."""
        lines: list[str] = []
        unfinished = False
        for name, text in map(self.host_of, output.splitlines()):
            if name != host:
                continue
            if unfinished:
                lines[-1] += text
            else:
                lines.append(text)
            unfinished = self.piece_bytes is not None and len(os.fsencode(text)) >= self.piece_bytes
        return lines


class Backend(Protocol):
    """Interface of a backend module."""

    def command(self, plan: LaunchPlan) -> Command:
        """The command for a plan. It starts nothing, and gives every rank the variables of the plan; ranks on other
        hosts also get ``LAUNCH_ID: plan.launch_id``. Raises RecipeError when this backend cannot express the plan."""
        ...


def get_backend(name: str) -> Backend:
    """The backend of that name; imports its module."""
    if name not in BACKENDS:
        raise RecipeError(f"--backend {name} is unknown{nearest(name, BACKENDS)} (known: {', '.join(BACKENDS)})")
    return cast(Backend, importlib.import_module(BACKENDS[name]))


__all__ = ["BACKENDS", "Backend", "Command", "get_backend"]
