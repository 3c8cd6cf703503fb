"""How far a long verb is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

import typer

_PLAIN_LINE_SECONDS = 10.0


class Show(Protocol):
    """Called with what is done, what there is in all, and a note to show beside it."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(what: str) -> Iterator[Show]:
    """A bar with rate and time left on a terminal, otherwise a line every ten seconds; both on stderr."""
    if not sys.stderr.isatty():
        yield _PlainProgress(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)


class _PlainProgress:
    """Progress for logs: a line every ten seconds and one at the end."""

    def __init__(self, what: str) -> None:
        self.what, self.began, self.last = what, time.monotonic(), time.monotonic()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.last < _PLAIN_LINE_SECONDS and done < total:
            return
        self.last = now
        rate = done / max(1e-9, now - self.began)
        left = (total - done) / rate if rate else 0.0
        typer.echo(f"{self.what}: {done}/{total} {rate:.1f}/s, {left:.0f} s left {note}".rstrip(), err=True)
