"""Whether a launch that failed is started again, when and where: a pure policy.

Only faults of the infrastructure are worth another attempt: exit code 3 (a host, a rank that hangs, the network, a
broken GPU) and deaths by a signal. Whatever the recipe, the data, the numbers or a bug have caused would come again.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import EXIT_CLUSTER

LONGEST_DELAY_SECONDS = 600.0
_INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How patient a launch is with its hosts."""

    max_restarts: int = 3
    """In a row without a newer complete checkpoint; 0 = never restart."""
    min_hosts: int = 1
    """With fewer it does not go on."""
    delay_seconds: float = 10.0
    """Before a restart; doubled after every restart without a newer checkpoint."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of all ranks of a launch, and how it ended."""

    number: int
    """From 1."""
    code: int
    cause: str
    """In one line."""
    hosts: tuple[str, ...] = ()
    lost_hosts: tuple[str, ...] = ()
    requested: bool = False
    """Somebody asked it to stop."""
    step: int | None = None
    """Steps finished at its end, as far as was heard."""
    saved_before: int | None = None
    """Step of the newest complete checkpoint when it began."""
    saved: int | None = None
    """The same when it had ended."""

    @property
    def progressed(self) -> bool:
        return self.saved is not None and (self.saved_before is None or self.saved > self.saved_before)

    def __str__(self) -> str:
        where = f"on {', '.join(self.hosts)}" if self.hosts else "nowhere"
        at = f" at step {self.step}" if self.step else ""
        saved = f"saved at step {self.saved}" if self.saved is not None else "nothing saved"
        return f"attempt {self.number} {where} ended{at} with exit code {self.code}, {saved}: {self.cause}"


@dataclass(frozen=True, slots=True)
class Restart:
    """The next attempt."""

    delay_seconds: float
    without: frozenset[str] = frozenset()
    """Hosts that do not take part in it."""


def next_attempt(policy: RestartPolicy, attempts: Sequence[Attempt], all_hosts: int) -> Restart | str:
    """The next attempt, or why there is none (empty: nobody would expect one).

    A host that was lost does not take part in the next attempt, so that a broken one cannot end every attempt, unless
    too few would be left. Later attempts ask it again.

    Args:
        policy: how patient.
        attempts: so far, at least one.
        all_hosts: number of hosts of the launch.
    """
    last = attempts[-1]
    if last.requested or not is_infrastructure(last.code):
        return ""
    if not policy.max_restarts:
        return ""
    restarts = [attempt for attempt in attempts if attempt.number > 1]
    fruitless = next((n for n, attempt in enumerate(reversed(restarts)) if attempt.progressed), len(restarts))
    if fruitless >= policy.max_restarts:
        return f"not restarted again: {fruitless} restarts in a row (--max-restarts) brought no newer checkpoint"
    delay = min(policy.delay_seconds * 2**fruitless, LONGEST_DELAY_SECONDS)
    enough = all_hosts - len(last.lost_hosts) >= max(policy.min_hosts, 1)
    return Restart(delay, frozenset(last.lost_hosts) if enough else frozenset())


def is_infrastructure(code: int) -> bool:
    """Whether a launch ended with this code for a reason that another attempt may not meet again."""
    return code == EXIT_CLUSTER or (code > 128 and code != _INTERRUPTED)


__all__ = ["Attempt", "Restart", "RestartPolicy", "is_infrastructure", "next_attempt"]
