"""Counters of the demo's data preparation: one bar per step on a terminal, one line per step elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from shards.build import BuildProgress

logger = logging.getLogger(__name__)


class Steps:
    """Context manager that hands out progress callbacks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._bar: Any = None
        self._start = time.monotonic()

    def __enter__(self) -> Steps:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A callback for ``(done, total)``."""
        task: Any = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if self._bar is not None:
                task = self._bar.add_task(what, total=total) if task is None else task
                self._bar.update(task, completed=done, total=total)
            elif done == total:
                logger.info("%s: %d %s (%.0f s)", self.name, total, what, time.monotonic() - self._start)

        return show

    def build(self, what: str) -> Callable[[BuildProgress], None]:
        """A callback for `shards.build.build`."""
        show = self.counter(what)
        return lambda progress: show(progress.done, progress.total)
