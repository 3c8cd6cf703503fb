"""Every rank tells its launcher every two seconds what it is doing, from a thread of its own.

A rank that is no longer heard is stopped or dead, or its host is gone. One that is heard but does not advance hangs.
One that nobody listens to any more goes on while it can; it ends itself when it does not advance, because nobody else
will end it: its host was cut off, and the launch has gone on without it.
Where no launcher of ours listens, rank 0 looks for the request of `slt launch stop` itself.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Protocol

from launch.notes import LAUNCH_ID, tell, this_rank
from launch.stop import read_request
from pipeline.errors import EXIT_CLUSTER, EXIT_INTERRUPTED

log = logging.getLogger(__name__)

PERIOD_SECONDS = 2.0
ABANDONED = "SLT_ABANDONED_SECONDS"
"""Environment variable: how long a rank may stay where it is once its launcher is gone."""
ABANDONED_SECONDS = 300.0


class Doing(Protocol):
    """What this process is doing (`pipeline.engine.phases`, which is not imported here)."""

    step: int
    total_steps: int

    @property
    def now(self) -> tuple[str, float]:
        """The present phase, and for how many seconds it has lasted."""
        ...


class Heartbeat:
    """Context manager: sends beats to the launcher while it lasts.

    Args:
        doing: written by the training thread.
    """

    def __init__(self, doing: Doing) -> None:
        self._doing = doing
        self._host = socket.gethostname()
        self._run_dir: Path | None = None
        self._asked = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def obey_requests_in(self, run_dir: Path) -> None:
        """From now on a request of `slt launch stop` for this run directory counts as SIGTERM to this process."""
        self._run_dir = run_dir

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=PERIOD_SECONDS)  # a launcher that does not read must not keep the rank

    def _beat(self) -> None:
        rank = this_rank()
        while True:
            phase, seconds = self._doing.now
            doing = {"phase": phase, "seconds": round(seconds, 1), "step": self._doing.step}
            doing |= {"total_steps": self._doing.total_steps, "host": self._host, "pid": os.getpid()}
            if not tell({"rank": rank, "beat": doing}) and LAUNCH_ID in os.environ:
                self._leave_if_stuck(phase, seconds)
            if self._run_dir is not None:
                self._obey(self._run_dir)
            if self._stop.wait(PERIOD_SECONDS):
                return

    def _leave_if_stuck(self, phase: str, seconds: float) -> None:
        if seconds > float(os.environ.get(ABANDONED, ABANDONED_SECONDS)):
            log.error("the launcher is gone, and this rank has been in `%s` for %.0f s: it ends", phase, seconds)
            os._exit(EXIT_CLUSTER)

    def _obey(self, run_dir: Path) -> None:
        request = read_request(run_dir)
        if request is None:
            return
        if request.now:
            os._exit(EXIT_INTERRUPTED)
        if not self._asked:  # a later request may be one to stop at once
            self._asked = True
            os.kill(os.getpid(), signal.SIGTERM)


__all__ = ["ABANDONED", "PERIOD_SECONDS", "Doing", "Heartbeat"]
