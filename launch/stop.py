"""The request of `slt launch stop`: a file in the run directory, because the launch may run on another machine."""

from __future__ import annotations

import getpass
import json
import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StorageError
from shards.atomic import write_atomic

log = logging.getLogger(__name__)

_FILE = "stop.json"


@dataclass(frozen=True, slots=True)
class StopRequest:
    """Somebody wants the run of a run directory to stop."""

    now: bool = False
    """Without saving."""
    who: str = "somebody"
    """User and machine, to show."""


def request_stop(run_dir: Path, now: bool) -> None:
    """Ask the run of a run directory to stop; with ``now`` at once, without saving.

    Raises:
        StorageError: the directory cannot be written.
    """
    who = f"{getpass.getuser()} on {socket.gethostname()}"
    try:
        write_atomic(run_dir / _FILE, json.dumps({"now": now, "who": who, "time": time.time()}))
    except OSError as error:
        raise StorageError(
            f"{run_dir / _FILE} could not be written: {error.strerror}; free space, or stop the launch by a signal to "
            "its process"
        ) from error


def read_request(run_dir: Path) -> StopRequest | None:
    """The request that waits in a run directory."""
    try:
        content = json.loads((run_dir / _FILE).read_text(encoding="utf-8"))
        return StopRequest(bool(content["now"]), str(content["who"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); nothing is stopped", run_dir / _FILE, error)
        return None


def forget_request(run_dir: Path) -> None:
    """A start does not obey what was asked of an earlier one."""
    (run_dir / _FILE).unlink(missing_ok=True)


__all__ = ["StopRequest", "forget_request", "read_request", "request_stop"]
