"""How a launch ended, from what its ranks reported and how its launcher ended."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.hang import Hang
from launch.notes import BEFORE_FIRST_STEP
from launch.pulse import Beat
from pipeline.errors import EXIT_BUG, EXIT_CLUSTER, EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED

log = logging.getLogger(__name__)

KILLED = 128 + signal.SIGKILL
# From least to most specific: when one rank fails, the others lose their connection and end with 1 or 3, so a more
# specific code is the cause.
_SEVERITY = (0, 75, 130, 1, 3, 2, 4, 6, 5)
_CONSEQUENCES = (EXIT_OK, EXIT_PREEMPTED, EXIT_INTERRUPTED, EXIT_BUG, EXIT_CLUSTER)


@dataclass(frozen=True, slots=True)
class Report:
    """A rank's report of how it ended."""

    rank: int
    code: int
    error: str = ""
    stopped: str = ""
    """After a request to stop: whether its work was saved."""
    step: int | None = None
    """Finished steps."""
    time: float = 0.0
    """By its host's clock, seconds since 1970; 0 = not told."""
    consequence: bool = False
    """It lost another rank: most likely that one is the cause."""

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Report:
        """Raises KeyError, TypeError or ValueError for anything but a report."""
        rank, code = int(values["rank"]), int(values["code"])
        error, stopped = (str(values.get(name) or "") for name in ("error", "stopped"))
        step, time = values.get("step"), float(values.get("time") or 0.0)
        consequence = bool(values.get("consequence"))
        return cls(rank, code, error, stopped, None if step is None else int(step), time, consequence)

    @property
    def failed(self) -> bool:
        return self.code not in (EXIT_OK, EXIT_PREEMPTED)


@dataclass(frozen=True, slots=True)
class Cause:
    """What went wrong first."""

    ranks: tuple[int, ...]
    """Empty for a host that was lost, or a launcher that failed."""
    what: str
    step: int | None = None
    """Finished steps of these ranks."""
    hang: bool = False
    details: tuple[str, ...] = ()
    """More lines: where in the code a rank hangs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a launch ended."""

    code: int
    """Exit code of the launch, see `worst_code`."""
    launcher_code: int
    rank_codes: dict[int, int] = field(default_factory=dict)
    """Ranks that reported; a missing rank was killed."""
    errors: dict[int, str] = field(default_factory=dict)
    signals: tuple[int, ...] = ()
    """Signals received and passed on."""
    stopped: str = ""
    """For a launch that stopped on request: whether its work was saved."""
    lost_hosts: tuple[str, ...] = ()
    """Hosts whose connection broke, or whose launcher was killed: ssh reports both in the same way."""
    cause: Cause | None = None
    """Of a failure."""
    last_heard: Mapping[int, str] = field(default_factory=dict)
    """Rank -> what it was doing by its last heartbeat."""
    heard_hosts: Mapping[int, str] = field(default_factory=dict)
    """Rank -> its own name of its host."""
    consequences: frozenset[int] = frozenset()
    """Ranks that ended because another one did."""
    step: int | None = None
    """Steps finished, as far as was heard."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the supervisor saw."""

    launcher_code: int
    signals: tuple[int, ...] = ()
    begun: bool = False
    """A rank reported that its first step begins."""
    killed: bool = False
    """We killed processes that did not leave; the launcher's exit code then says nothing about the cause."""
    lost_hosts: tuple[str, ...] = ()
    hang: Hang | None = None
    first_dead: int | None = None
    """The rank that died before all others of a launch on this machine, where somebody saw it."""
    beats: Mapping[int, Beat] = field(default_factory=dict)
    """Last heartbeat per rank."""
    stacks: tuple[str, ...] = ()
    """Innermost lines of a rank that hangs."""


def verdict(reports: Mapping[int, Report], world_size: int, seen: Evidence) -> Outcome:
    """The outcome of a launch. Ranks that end without a report after a signal and before the first step lost nothing:
    they were stopped, not killed."""
    codes = {rank: report.code for rank, report in sorted(reports.items())}
    errors = {rank: report.error for rank, report in sorted(reports.items()) if report.error}
    interrupted = signal.SIGINT in seen.signals
    if _stopped_before_first_step(reports, world_size, seen):
        code, stopped = EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED, BEFORE_FIRST_STEP
    else:
        code = _code(reports, world_size, seen)
        reasons = (report.stopped for report in reports.values() if report.stopped)
        stopped = next(reasons, "") if code in (EXIT_PREEMPTED, EXIT_INTERRUPTED) else ""
    cause = None if stopped or code in (EXIT_OK, EXIT_PREEMPTED) else _cause(reports, world_size, seen, code)
    heard = {rank: f"`{beat.phase}` after step {beat.step}" for rank, beat in sorted(seen.beats.items())}
    hosts = {rank: beat.host for rank, beat in seen.beats.items()}
    consequences = _consequences(reports, world_size, cause)
    outcome = Outcome(code, seen.launcher_code, codes, errors, seen.signals, stopped, seen.lost_hosts)
    steps = [beat.step for beat in seen.beats.values()]
    steps += [report.step for report in reports.values() if report.step is not None]
    step = max(steps, default=None)
    return dataclasses.replace(
        outcome, cause=cause, last_heard=heard, heard_hosts=hosts, consequences=consequences, step=step
    )


def _code(reports: Mapping[int, Report], world_size: int, seen: Evidence) -> int:
    silent = len(reports) < world_size
    other = silent or any(report.failed and not report.consequence for report in reports.values())
    # a lost connection to another rank says nothing where that rank is known to have ended
    told = {rank: EXIT_OK if other and report.consequence else report.code for rank, report in reports.items()}
    if silent and not reports and not seen.launcher_code and not seen.killed and not seen.hang:
        return EXIT_CLUSTER  # the launcher is content, but nobody trained
    unreachable = bool(seen.lost_hosts) or seen.hang is not None
    return worst_code(told, 0 if seen.killed else seen.launcher_code, world_size, unreachable)


def _cause(reports: Mapping[int, Report], world_size: int, seen: Evidence, code: int) -> Cause | None:
    if seen.hang is not None:
        return Cause(seen.hang.ranks, str(seen.hang), seen.hang.step, True, seen.stacks)
    guilty = [report for report in reports.values() if report.code == code and not report.consequence]
    if guilty:
        first = min(guilty, key=lambda report: (report.time, report.rank))
        return Cause((first.rank,), first.error or f"exit code {code}", first.step)
    if seen.lost_hosts:
        return Cause((), f"the connection to {', '.join(seen.lost_hosts)} was lost")
    silent = tuple(rank for rank in range(world_size) if rank not in reports)
    if seen.first_dead in silent:
        silent = (seen.first_dead,)
    if silent and (reports or seen.beats):
        steps = [seen.beats[rank].step for rank in silent if rank in seen.beats]
        return Cause(silent, "killed, or ended without a word", max(steps, default=None))
    if silent:
        return Cause((), f"the launcher ended with exit code {seen.launcher_code}, but no rank ever reported")
    first = min(reports.values(), key=lambda report: (not report.failed, report.time, report.rank))
    return Cause((first.rank,), first.error or f"exit code {first.code}", first.step)


def _consequences(reports: Mapping[int, Report], world_size: int, cause: Cause | None) -> frozenset[int]:
    """Ranks that lost a peer, and those that had to be killed because another rank is the cause."""
    if cause is None or not (cause.ranks or reports):
        return frozenset()
    lost_peer = {rank for rank, report in reports.items() if report.consequence}
    silent = set(range(world_size)) - set(reports) if cause.ranks else set()
    return frozenset((lost_peer | silent) - set(cause.ranks))


def _stopped_before_first_step(reports: Mapping[int, Report], world_size: int, seen: Evidence) -> bool:
    """If one rank left before its first step, so did all: they cannot finish a step without it. The others' codes are
    then consequences, unless they mean more than a lost connection."""
    if not seen.signals or any(report.code not in _CONSEQUENCES for report in reports.values()):
        return False
    if any(report.stopped == BEFORE_FIRST_STEP for report in reports.values()):
        return True
    finished = len(reports) == world_size and not any(report.code for report in reports.values())
    return not (seen.begun or seen.killed or finished)


def worst_code(rank_codes: Mapping[int, int], launcher_code: int, world_size: int, lost: bool = False) -> int:
    """One exit code for the launch: 0 and 75 only if all ranks agree, 128+n for a death by signal.

    A rank without a report was killed. If the launcher saw a signal first, that is the cause; if another rank reported
    a failure, that is the cause, and the silent rank was stopped because of it. A launcher that fails before any rank
    reports is a cluster problem, and so is a ``lost`` connection to a host, which silences its ranks.
    """
    death = 0 if lost else _signal_death(launcher_code)
    failures = [code for code in rank_codes.values() if code not in (EXIT_OK, EXIT_PREEMPTED)]
    silent = len(rank_codes) < world_size
    if silent and lost:
        failures.append(EXIT_CLUSTER)
    if silent and death:
        return death
    if failures:
        return max(failures, key=_severity)
    if silent:
        nobody_started = not rank_codes and launcher_code > 0
        return EXIT_CLUSTER if nobody_started else KILLED
    if EXIT_PREEMPTED in rank_codes.values():
        return EXIT_PREEMPTED
    return death or (EXIT_CLUSTER if lost else launcher_code)  # 0, unless something broke after the last report


def _severity(code: int) -> int:
    return _SEVERITY.index(code) if code in _SEVERITY else len(_SEVERITY) + code


def _signal_death(launcher_code: int) -> int:
    """128+n if the launcher died by signal n or reported that a rank did; else 0."""
    if launcher_code < 0:
        return 128 - launcher_code
    if launcher_code > 192:  # DeepSpeed exits with the rank's -n, which the system shows as 256-n
        return 128 + 256 - launcher_code
    return launcher_code if launcher_code > 128 and launcher_code != 130 else 0


def read_reports(logs: Path, quiet: bool = False) -> dict[int, Report]:
    """The exit notes that ranks have written so far, without damaged ones."""
    reports: dict[int, Report] = {}
    for path in sorted(logs.glob("exit-rank-*.json")):
        try:
            report = Report.read(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not quiet:  # while ranks run, a report may be half written
                log.warning("%s is not a usable exit report (%s); its rank counts as killed", path, error)
            continue
        reports[report.rank] = report
    return reports


__all__ = ["KILLED", "Cause", "Evidence", "Outcome", "Report", "read_reports", "verdict", "worst_code"]
