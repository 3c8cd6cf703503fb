"""Options of `slt launch run` beyond those of its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from launch.options import LaunchOptions

_HANG_SECONDS = "A step or a wait for data that lasts longer is a hang (default: by the steps so far; 0: never)."
_HEALTH = "Trial of the hosts: full, quick or off (default: quick for GPUs of several hosts, else off)."
_EXCLUDE_BAD = "Go on without hosts that cannot take part, on as many ranks as the global batch allows."


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(LaunchOptions):
    """The command line of `slt launch run`."""

    grace_seconds: Annotated[float, typer.Option(min=0, help="Time for ranks to save after a signal.")] = 300.0
    hang_seconds: Annotated[float | None, typer.Option(min=0, help=_HANG_SECONDS)] = None
    exclude_bad: Annotated[bool, typer.Option("--exclude-bad", help=_EXCLUDE_BAD)] = False
    health: Annotated[str | None, typer.Option(help=_HEALTH)] = None


__all__ = ["RunOptions"]
