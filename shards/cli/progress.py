"""Progress of a long verb: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

import typer

_PLAIN_LINE_SECONDS = 10.0


class Show(Protocol):
    """Called with the number done, the total, a note, and how many of those done an earlier run did: these do not count
    for the rate and the time left."""

    def __call__(self, done: int, total: int, note: str = "", before: int = 0) -> None: ...


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
        known = 0

        def show(done: int, total: int, note: str = "", before: int = 0) -> None:
            nonlocal known
            if before > known:  # reset the speed, which would count the work of an earlier run
                known = before
                bar.reset(task, completed=done, total=total, note=note)
            bar.update(task, completed=done, total=total, note=note)

        yield show


class _PlainProgress:
    """Progress for logs: a line every ten seconds and one at the end."""

    def __init__(self, what: str) -> None:
        self.what, self.began, self.last = what, time.monotonic(), time.monotonic()

    def __call__(self, done: int, total: int, note: str = "", before: int = 0) -> None:
        now = time.monotonic()
        if now - self.last < _PLAIN_LINE_SECONDS and done < total:
            return
        self.last = now
        rate = (done - before) / max(1e-9, now - self.began)
        left = f"{(total - done) / rate:.0f} s left" if rate else "time left unknown"
        typer.echo(
            f"{self.what}: {done}/{total} {rate:.1f}/s, {left if done < total else '0 s left'} {note}".rstrip(),
            err=True,
        )
