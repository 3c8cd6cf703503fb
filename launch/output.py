"""Copies the output of a launch to its log and to stderr, and takes out what ranks report on it."""

from __future__ import annotations

import logging
import re
import sys
import time
from typing import IO

from launch import notes
from launch.pulse import Beat, Pulses
from launch.verdict import Report

log = logging.getLogger(__name__)

_SLOW_SECONDS = 1.0  # a copy on a disk that hangs; meanwhile nobody is heard


class Output:
    """What a launch has said so far; `copy` runs in a thread of its own.

    Args:
        lost_host: as `Command.lost_host`.
    """

    def __init__(self, lost_host: str | None) -> None:
        self._lost_host = lost_host
        self.pulses = Pulses()
        self.reports: dict[int, Report] = {}
        self.begun = False
        """A rank reported that its first step begins."""
        self.lost: list[str] = []
        """Hosts whose connection broke."""
        self.we_kill = False
        """From now on connections end because of us."""
        self.writing = False
        """A copy is being written; on a disk that hangs this lasts, and nobody is heard meanwhile."""

    def copy(self, source: IO[bytes] | None, sink: IO[bytes]) -> None:
        """Copy line by line to the log and to stderr until the end, without the ranks' reports.

        A closed stderr or a full disk stops only that copy: ranks must never wait for a reader.
        """
        assert source is not None
        copies: list[tuple[IO[bytes], str]] = [
            (sink, "the run directory's launch.log cannot be written (%s); output goes to stderr only"),
            (sys.stderr.buffer, "stderr is closed (%s); output goes to the log only"),
        ]
        rest = b""
        while True:
            chunk = source.read1(65536)  # type: ignore[attr-defined]
            *lines, rest = (rest + chunk).split(b"\n")
            if not chunk and rest:
                lines.append(rest)
            shown = (self.read(line.decode(errors="surrogateescape")) for line in lines)
            text = "".join(f"{line}\n" for line in shown if line is not None).encode(errors="surrogateescape")
            self.writing, begun = True, time.monotonic()
            for copy in [*copies] if text else []:
                try:
                    copy[0].write(text)
                    copy[0].flush()
                except (OSError, ValueError) as error:
                    copies.remove(copy)
                    log.warning(copy[1], error)
            if (took := time.monotonic() - begun) > _SLOW_SECONDS:
                self.pulses.forgive(took)
            self.writing = False
            if not chunk:
                return

    def read(self, line: str) -> str | None:
        """A line of the launcher's output -> the text to show, None for nothing."""
        shown, report = notes.read(line)
        if report is not None:
            self._take(report, line)
            return shown if _has_text(shown) else None
        match = re.match(self._lost_host, line) if self._lost_host is not None and not self.we_kill else None
        if match is not None and match[1] not in self.lost:  # SLURM tells it once for every step
            self.lost.append(match[1])
        return line

    def _take(self, report: dict[str, object], line: str) -> None:
        try:
            self.begun = self.begun or bool(report.get("begun"))
            if "beat" in report:
                self.pulses.take(Beat.read(report, time.monotonic()))
            if "code" in report:
                rank_report = Report.read(report)
                self.reports[rank_report.rank] = rank_report
        except (KeyError, TypeError, ValueError) as problem:
            log.warning("a rank's report cannot be used (%r): %s", problem, line)


def _has_text(rest: str) -> bool:
    """Whether a line has text before its report, other than the name of host or rank that launchers add."""
    return bool(rest) and re.fullmatch(r" *\S+: ?", rest) is None


__all__ = ["Output"]
