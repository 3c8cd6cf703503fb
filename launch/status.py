"""The state of a launch in ``run_dir/logs/status.json``: its launcher writes it every two seconds, anyone may read it.

A thread of its own writes, and looks for a request to stop: a disk that hangs must not keep the launcher from stopping
ranks.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.pulse import Pulses
from launch.stop import StopRequest, read_request
from pipeline.errors import StorageError
from shards.atomic import write_atomic

log = logging.getLogger(__name__)

WRITE_SECONDS = 2.0
_TAIL_BYTES = 65536


class Journal:
    """What is known of a launch over all its attempts; `keeping` writes it while it lasts.

    Args:
        run_dir: of the run.
        launch_id: of the launch.
    """

    def __init__(self, run_dir: Path, launch_id: str) -> None:
        self.run_dir = run_dir
        self.request: StopRequest | None = None
        """Somebody asked the launch to stop."""
        self.values: dict[str, Any] = {
            "launch_id": launch_id,
            "state": "starting",
            "attempt": 1,
            "launcher": {"host": socket.gethostname(), "pid": os.getpid()},
            "begun": time.time(),
            "restarts": [],
        }
        self._ranks: Callable[[], dict[str, Any]] = dict
        self._failed_before = False
        self._lock = threading.Lock()

    def set(self, **values: Any) -> None:
        """Change values of the status; the next writing shows them."""
        self.values = {**self.values, **values}

    def show_ranks(self, ranks: Callable[[], dict[str, Any]]) -> None:
        """From now on the status also shows what this returns."""
        self._ranks = ranks

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Write the status every two seconds, and once more at the end."""
        stop = threading.Event()
        thread = threading.Thread(target=self._keep, args=(stop,), name="status", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=10)  # on a disk that hangs the last status stays away

    def write(self) -> None:
        """Write now. A disk that takes nothing is told of once: the run can go on without its status."""
        status = {**self.values, **self._ranks(), "metrics": last_row(self.run_dir), "written": time.time()}
        with self._lock:
            try:
                (self.run_dir / "logs").mkdir(exist_ok=True)
                write_atomic(self.run_dir / "logs" / "status.json", json.dumps(status))
                self._failed_before = False
            except OSError as error:
                if not self._failed_before:
                    log.warning("status.json could not be written: %s; `slt launch status` is out of date", error)
                self._failed_before = True

    def _keep(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self.write()
            self.request = read_request(self.run_dir) or self.request  # a later one may be more urgent
            stop.wait(WRITE_SECONDS)
        self.write()


def rank_states(pulses: Pulses, hosts: Mapping[int, str], now: float) -> dict[str, Any]:
    """Progress and the ranks of every host, for `Journal.show_ranks`.

    Args:
        pulses: of the ranks.
        hosts: rank -> host, as the plan names it; a rank that is not among these says itself where it is.
        now: by the clock of the pulses.
    """
    hosts = {**{rank: beat.host for rank, beat in sorted(pulses.last.items())}, **hosts}
    shown: dict[str, list[dict[str, Any]]] = {name: [] for name in hosts.values()}
    for rank, host in hosts.items():
        beat = pulses.last.get(rank)
        state: dict[str, Any] = {"rank": rank, "phase": None, "step": None, "silent_seconds": None}
        if beat is not None:
            state |= {"phase": beat.phase, "seconds": round(beat.stuck(now), 1), "step": beat.step}
            state["silent_seconds"] = round(beat.age(now), 1)
        shown[host].append(state)
    rate, left = pulses.steps_per_second(), pulses.total_steps - pulses.step
    eta = left / rate if rate and pulses.total_steps else None
    return {
        "step": pulses.step,
        "total_steps": pulses.total_steps,
        "steps_per_second": rate,
        "eta_seconds": eta,
        "hosts": [{"name": name, "ranks": ranks} for name, ranks in shown.items()],
    }


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What the launcher of a run directory last wrote; None if it never did.

    Raises:
        StorageError: it cannot be read.
    """
    path = run_dir / "logs" / "status.json"
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}; ask where the launch runs, or remove the file") from error
    return status if isinstance(status, dict) else None


def last_row(run_dir: Path) -> dict[str, Any] | None:
    """The newest whole row of metrics.jsonl."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = file.read().splitlines(keepends=True)
    except OSError:  # none yet
        return None
    for line in reversed(lines):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            return row if isinstance(row, dict) else None
    return None


__all__ = ["WRITE_SECONDS", "Journal", "last_row", "rank_states", "read_status"]
