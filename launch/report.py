"""How a launch ended, in lines for people: the verdict, its cause, then the other ranks that failed."""

from __future__ import annotations

from launch.notes import BEFORE_FIRST_STEP
from launch.plan import LaunchPlan
from launch.verdict import Outcome
from pipeline.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED

_MEANING = {
    EXIT_OK: "finished",
    EXIT_BUG: "failed: a bug or an unexpected error, see the traceback above",
    2: "failed: the recipe, an option or a file that cannot be written",
    3: "failed: a host or the launcher",
    4: "failed: the data",
    5: "stopped: training diverged",
    6: "failed: damaged checkpoints",
    EXIT_PREEMPTED: "stopped and saved; start the same command again to resume",
    EXIT_INTERRUPTED: "interrupted",
}
_LOST = "connection lost, or the launcher there was killed; ranks may still run there if it cannot be reached"


def report(outcome: Outcome, plan: LaunchPlan) -> list[str]:
    """The outcome of a launch in a few lines; equal errors once."""
    meaning = _MEANING.get(outcome.code) or (
        f"killed by signal {outcome.code - 128}" if outcome.code > 128 else "failed: the launcher, see its output above"
    )
    if outcome.stopped:
        verb = "interrupted" if outcome.code == EXIT_INTERRUPTED else "stopped"
        comma = "" if outcome.stopped == BEFORE_FIRST_STEP else ","
        return [
            f"launch {verb}{comma} {outcome.stopped}; start the same command again to resume (exit code {outcome.code})"
        ]
    lines = [f"launch {meaning} (exit code {outcome.code})"]
    if outcome.code in (EXIT_OK, EXIT_PREEMPTED):
        return lines
    lines += [f"  {host}: {_LOST}" for host in outcome.lost_hosts]
    cause = outcome.cause
    if cause is not None and not cause.ranks and not outcome.lost_hosts:
        lines.append(f"  {cause.what}")
    # where every host has a launcher, others know of the ranks that were never heard here
    known = {rank for rank in range(plan.world_size) if plan.node_rank is None or _is_known(outcome, rank)}
    texts = {rank: _text(outcome, rank) for rank in sorted(known)}
    first = cause.ranks if cause is not None else ()
    for text in dict.fromkeys(texts[rank] for rank in (*first, *texts) if texts.get(rank)):
        ranks = [rank for rank, own in texts.items() if own == text]
        lines.append(f"  {_who(ranks, outcome, plan)}: {text}")
        if cause is not None and cause.ranks and cause.ranks[0] in ranks:
            lines += [f"    {line}" for line in cause.details]
    return lines


def _is_known(outcome: Outcome, rank: int) -> bool:
    is_cause = outcome.cause is not None and rank in outcome.cause.ranks
    return is_cause or rank in outcome.rank_codes or rank in outcome.last_heard


def summary(outcome: Outcome, plan: LaunchPlan) -> str:
    """The cause of a failure in one line."""
    cause = outcome.cause
    if cause is None:
        return _MEANING.get(outcome.code, f"exit code {outcome.code}")
    what = cause.what.strip().splitlines()[-1] if cause.what.strip() else f"exit code {outcome.code}"
    return f"{_who(list(cause.ranks), outcome, plan)}: {what}" if cause.ranks else what


def _who(ranks: list[int], outcome: Outcome, plan: LaunchPlan) -> str:
    hosts = ", ".join(dict.fromkeys(_host(rank, outcome, plan) for rank in ranks))
    return f"rank {','.join(map(str, ranks))} on {hosts}"


def _host(rank: int, outcome: Outcome, plan: LaunchPlan) -> str:
    """A rendezvous numbers the ranks itself: only they know where they are, and only this host's were heard here."""
    return plan.ranks[rank].host if plan.rendezvous is None else outcome.heard_hosts.get(rank, "another host")


def _text(outcome: Outcome, rank: int) -> str:
    """How a rank ended; empty for one that did well."""
    cause = outcome.cause
    if (
        cause is not None
        and rank in cause.ranks
        and rank not in outcome.rank_codes
        and not cause.what.startswith("kill")
    ):
        return cause.what
    if rank in outcome.consequences:
        return "ended because of that"
    code = outcome.rank_codes.get(rank)
    if code is None:
        heard = f"; last heard in {outcome.last_heard[rank]}" if rank in outcome.last_heard else ""
        return f"no report; it was killed or never started{heard}"
    if code == EXIT_OK:
        return ""
    error = outcome.errors.get(rank, "").strip()
    # an unexpected error carries its traceback, which was printed already; its last line names it
    error = error.splitlines()[-1] if code == EXIT_BUG and error else error
    return ": ".join(part for part in (f"exit code {code}", error) if part)


__all__ = ["report", "summary"]
