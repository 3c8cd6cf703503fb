"""Options of `slt launch run` beyond those of its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from launch.options import LaunchOptions
from launch.recovery import RestartPolicy

_POLICY = RestartPolicy()
_MAX_RESTARTS = "Restarts in a row, after a fault of hosts or ranks, without a newer checkpoint; 0: none."
_MIN_HOSTS = "A launch goes on with the hosts that remain, but not with fewer than these."
_RESTART_DELAY = "Seconds before a restart; doubled after each one without a newer checkpoint."
_HANG_SECONDS = "A step or a wait for data that lasts longer is a hang (default: by the steps so far; 0: never)."
_HEALTH = "Trial of the hosts: full, quick or off (default: quick for GPUs of several hosts, else off)."
_EXCLUDE_BAD = "Go on without hosts that cannot take part, on as many ranks as the global batch allows."


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(LaunchOptions):
    """The command line of `slt launch run`."""

    grace_seconds: Annotated[float, typer.Option(min=0, help="Time for ranks to save after a signal.")] = 300.0
    hang_seconds: Annotated[float | None, typer.Option(min=0, help=_HANG_SECONDS)] = None
    max_restarts: Annotated[int, typer.Option(min=0, help=_MAX_RESTARTS)] = _POLICY.max_restarts
    min_hosts: Annotated[int, typer.Option(min=1, help=_MIN_HOSTS)] = _POLICY.min_hosts
    restart_delay: Annotated[float, typer.Option(min=0, help=_RESTART_DELAY)] = _POLICY.delay_seconds
    exclude_bad: Annotated[bool, typer.Option("--exclude-bad", help=_EXCLUDE_BAD)] = False
    health: Annotated[str | None, typer.Option(help=_HEALTH)] = None


__all__ = ["RunOptions"]
