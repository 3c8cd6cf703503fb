"""A progress bar on a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

import logging
import sys
from typing import Any

from pipeline.dist import Ranks
from pipeline.engine.metrics import describe

logger = logging.getLogger(__name__)

_SHOWN = ("train/loss", "train/lr", "train/grad_norm", "perf/samples_per_second", "data/wait_seconds")


class Progress:
    """Context manager; `update` shows the last metrics."""

    def __init__(self, name: str, total: int, done: int, ranks: Ranks) -> None:
        self.name, self.total, self.done, self.enabled = name, total, done, ranks.is_main
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[shown]}"), console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, completed=self.done, shown="")
        return self

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show a finished step."""
        if not self.enabled:
            return
        shown = describe({name: metrics[name] for name in _SHOWN if name in metrics})
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
        else:
            logger.info("%s step %d/%d  %s", self.name, step, self.total, shown)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
