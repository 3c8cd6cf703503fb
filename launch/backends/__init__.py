"""Backends turn a `LaunchPlan` into one command and do nothing else; `launch/supervise.py` runs it.

Adding one: a module with ``command(plan) -> Command`` and a line in `BACKENDS`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Protocol, cast

from launch.carry import HostCommand
from launch.plan import LaunchPlan
from pipeline.config.names import nearest
from pipeline.errors import RecipeError

BACKENDS = {
    "local": "launch.backends.local",
    "deepspeed": "launch.backends.deepspeed",
}
"""Name -> module."""


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start on this machine; it starts the ranks."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    """Set on top of the current environment."""
    arrives: HostCommand | None = None
    """The command that every host then runs; None if that is ``argv`` itself, on this machine."""
    remote: tuple[str, ...] | None = None
    """Runs a shell command, in place of ``{command}``, on all hosts of the ranks. None if every rank is local."""
    lost_host: str | None = None
    """Regular expression of the output line that reports a lost connection to a host; group 1 is the host's name."""


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
