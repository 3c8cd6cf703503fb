"""`slt launch status` and `slt launch stop`: ask about a run, and end it, from any machine that sees its folder."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launch.lock import STALE_SECONDS, WITHOUT_LAUNCHER, locked_at, look
from launch.status import WRITE_SECONDS, last_row, read_status
from launch.stop import request_stop
from pipeline.engine.goodput import duration, read_rows, split
from pipeline.errors import ClusterError, RecipeError

_STALE_SECONDS = 15.0
_SHOWN_METRICS = 8


def status_command(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every two seconds, until the launch ends.")
    ] = False,
) -> None:
    """Progress, speed, hosts, restarts and newest metrics of a run, from any machine that sees its folder."""
    while True:
        status = current(run_dir)
        if as_json:
            sys.stdout.write(json.dumps(status) + "\n")
        else:
            console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
            if watch and console.is_terminal:
                console.clear()
            for line in describe(status):
                console.print(line)
        sys.stdout.flush()
        if not watch or not status["running"]:
            return
        time.sleep(WRITE_SECONDS)


def stop_command(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.")],
    now: Annotated[bool, typer.Option("--now", help="At once, without saving.")] = False,
    wait_seconds: Annotated[float, typer.Option(min=0, help="How long to wait for the end; 0 = not at all.")] = 360.0,
) -> None:
    """Ask a run to save and stop, from any machine that sees its folder, and wait until it has."""
    if not current(run_dir)["running"]:
        raise RecipeError(f"nothing to stop: {describe(current(run_dir))[0]}")
    request_stop(run_dir, now)
    if not wait_seconds:
        typer.echo(f"{run_dir} was asked to stop; it looks every {WRITE_SECONDS:g} s")
        return
    deadline = time.monotonic() + wait_seconds
    while (status := current(run_dir))["running"]:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{run_dir} has not stopped within {wait_seconds:g} s; look with `slt launch status`, wait longer with "
                "--wait-seconds, or end it without saving: --now"
            )
        time.sleep(0.5)
    typer.echo(describe(status)[0])


def current(run_dir: Path) -> dict[str, Any]:
    """The status of a run directory; also whether a launch is ``running``, and the status' ``age_seconds``.

    Raises:
        RecipeError: nothing was ever started there.
    """
    status, held = read_status(run_dir), look(run_dir)
    if status is None and held is None:
        raise RecipeError(f"{run_dir} is no run directory: it holds neither logs/status.json nor a launch.lock")
    running = held is not None and held[1] < STALE_SECONDS
    if status is None or (held is not None and running and held[0] != status["launch_id"]):  # of an earlier launch
        status = {"state": "starting", "launch_id": held[0] if held else "", "metrics": last_row(run_dir)}
    # before its first status a launch is known by its lock alone
    written = status["written"] if "written" in status else locked_at(run_dir)
    age = max(time.time() - written, 0.0)
    return {**status, "running": running, "age_seconds": age, "goodput": _goodput(run_dir)}


def describe(status: dict[str, Any]) -> list[str]:
    """A status in lines for people; the first says what became of the launch."""
    lines = [_headline(status)]
    if status.get("total_steps"):
        lines.append(_progress(status))
    for host in status.get("hosts", []) if status["running"] else []:
        lines += [f"  {host['name']}: rank {rank['rank']} {_rank(rank)}" for rank in host["ranks"]]
    for restart in status.get("restarts", []):
        at = f" at step {restart['step']}" if restart["step"] is not None else ""
        lines.append(f"  attempt {restart['attempt']} ended{at}: {restart['cause']}")
    if status.get("metrics"):
        lines.append(_metrics(status["metrics"]))
    if status.get("goodput"):
        lines.append(f"  {status['goodput']['text']}")
    return lines


def _goodput(run_dir: Path) -> dict[str, Any]:
    """Where the time of all attempts went; empty for a run that has not said."""
    rows = read_rows(run_dir)
    if not rows:
        return {}
    found = split(rows)
    return {"share": found.goodput, "seconds": dict(found.seconds), "text": found.describe()}


def _headline(status: dict[str, Any]) -> str:
    name, ago = f"launch {status['launch_id']}", duration(status["age_seconds"])
    if not status["running"] and status["state"] == "ended":
        return f"no launch runs here; the last one ended {ago} ago: {status['message']}"
    if not status["running"]:
        return f"no launch runs here; {name} died without a word, last heard of {ago} ago ({status['state']})"
    if status["launch_id"] == WITHOUT_LAUNCHER:
        return "a job runs here that `slt launch run` did not start: only its metrics are known"
    ranks = f" on {status['world_size']} ranks" if "world_size" in status else ""
    attempt = f", attempt {status['attempt']}" if "attempt" in status else ""
    line = f"{name}: {status['state']}{ranks}{attempt}"
    if status["age_seconds"] > _STALE_SECONDS:
        line += f"; LAST HEARD OF {ago} ago: its launcher on {status['launcher']['host']} may be gone"
    return line


def _progress(status: dict[str, Any]) -> str:
    line = f"  step {status['step']} of {status['total_steps']}"
    if status.get("steps_per_second"):
        line += f", {status['steps_per_second']:.3g} steps per second"
    if status["running"] and status.get("eta_seconds") is not None:
        line += f", {duration(status['eta_seconds'])} left"
    return line


def _rank(rank: dict[str, Any]) -> str:
    if rank["phase"] is None:
        return "not heard yet"
    silent = f", SILENT for {duration(rank['silent_seconds'])}" if rank["silent_seconds"] > _STALE_SECONDS else ""
    return f"step {rank['step']}, {rank['phase']} for {duration(rank['seconds'])}{silent}"


def _metrics(row: dict[str, Any]) -> str:
    numbers = [
        f"{name} {value:.4g}"
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, float)
    ]
    return f"  metrics of step {row.get('step')}: " + ", ".join(numbers[:_SHOWN_METRICS])


__all__ = ["current", "describe", "status_command", "stop_command"]
