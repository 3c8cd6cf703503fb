"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Any

from pipeline.engine.metrics import describe

logger = logging.getLogger(__name__)

_SHOWN = ("train/loss", "train/lr", "train/grad_norm", "perf/samples_per_second", "data/wait_seconds")


class Progress:
    """Shows the last metrics; the bar stays until `close`."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self.name, self.total = name, total
        self._bar = _bar(name, total, done) if sys.stderr.isatty() else None

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show a finished step."""
        shown = describe({name: metrics[name] for name in _SHOWN if name in metrics})
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, shown=shown)
        else:
            logger.info("%s step %d/%d  %s", self.name, step, self.total, shown)

    def close(self) -> None:
        """May be called again."""
        if self._bar is not None:
            self._bar.stop()


def _bar(name: str, total: int, done: int) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[shown]}"), console=Console(stderr=True),
    )  # fmt: skip
    bar.start()
    bar.add_task(name, total=total, completed=done, shown="")
    return bar
