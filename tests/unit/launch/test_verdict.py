"""The first cause of a failure, and what people read of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.hang import Hang
from launch.hostfile import Host
from launch.plan import LaunchPlan, plan_ranks
from launch.pulse import Beat
from launch.report import report, summary
from launch.verdict import Cause, Evidence, Outcome, Report, verdict

HOSTS = (Host("a", (0,)), Host("b", (0,)))
PLAN = LaunchPlan(Path("s"), (), Path("r"), HOSTS, plan_ranks(HOSTS, "a", 1), "id")


def lost(rank: int, time: float = 0.0) -> Report:
    return Report(rank, 3, "another rank could not be reached: Connection closed by peer", "", 11, time, True)


def beats(*steps: int) -> dict[int, Beat]:
    return {rank: Beat(rank, "h", 1, "step", 1.0, step, 20, 0.0) for rank, step in enumerate(steps)}


def seen(code: int, **what: object) -> Evidence:
    return Evidence(code, **{"begun": True, "beats": beats(12, 11), **what})  # type: ignore[arg-type]


def ended(*reports: Report, evidence: Evidence) -> Outcome:
    return verdict({one.rank: one for one in reports}, 2, evidence)


def test_a_killed_rank_is_the_cause_and_not_the_one_that_lost_it() -> None:
    outcome = ended(lost(0), evidence=seen(1))
    assert outcome.code == 137 and outcome.cause == Cause((1,), "killed, or ended without a word", 11)
    assert outcome.step == 12
    assert report(outcome, PLAN) == [
        "launch killed by signal 9 (exit code 137)",
        "  rank 1 on b: no report; it was killed or never started; last heard in `step` after step 11",
        "  rank 0 on a: ended because of that",
    ]
    assert summary(outcome, PLAN) == "rank 1 on b: killed, or ended without a word"


def test_the_first_of_two_that_fail_alike_is_the_cause() -> None:
    reports = [Report(0, 4, "shard 3 is damaged", "", 7, 20.0), Report(1, 4, "shard 5 is damaged", "", 7, 10.0)]
    outcome = ended(*reports, evidence=seen(4))
    assert outcome.cause == Cause((1,), "shard 5 is damaged", 7)
    assert report(outcome, PLAN)[1] == "  rank 1 on b: exit code 4: shard 5 is damaged"


def test_a_bug_behind_a_lost_peer_is_the_bug() -> None:
    """The rank that lost it ends with 3, which is more specific than 1, but only because of it."""
    outcome = ended(lost(0, 10.0), Report(1, 1, "Traceback\nValueError: x", "", 7, 20.0), evidence=seen(1))
    assert outcome.code == 1 and outcome.cause is not None and outcome.cause.ranks == (1,)
    assert report(outcome, PLAN)[1:] == [
        "  rank 1 on b: exit code 1: ValueError: x",
        "  rank 0 on a: ended because of that",
    ]


def test_all_ranks_lost_each_other() -> None:
    outcome = ended(lost(0, 20.0), lost(1, 10.0), evidence=seen(3))
    assert outcome.code == 3 and outcome.cause is not None and outcome.cause.ranks == (1,)
    assert "Connection closed by peer" in report(outcome, PLAN)[1]


def test_who_died_first_where_it_was_seen() -> None:
    outcome = ended(evidence=seen(256 - 9, first_dead=1))
    assert outcome.code == 137 and outcome.cause is not None and outcome.cause.ranks == (1,)
    assert report(outcome, PLAN)[2] == "  rank 0 on a: ended because of that"
    outcome = ended(evidence=seen(256 - 9))
    assert outcome.cause is not None and outcome.cause.ranks == (0, 1)


def test_a_hang_is_the_clusters_and_shows_where() -> None:
    hang = Hang((1,), "data", 11, 400.0, silent=False, everybody=False)
    outcome = ended(evidence=seen(-9, killed=True, hang=hang, stacks=("read (loader.py:3)", "all stacks: x")))
    assert outcome.code == 3
    assert report(outcome, PLAN) == [
        "launch failed: a host or the launcher (exit code 3)",
        "  rank 1 on b: hangs: for 400 s in `data` after step 11",
        "    read (loader.py:3)",
        "    all stacks: x",
        "  rank 0 on a: ended because of that",
    ]


def test_a_lost_host() -> None:
    outcome = ended(lost(0), evidence=seen(255, lost_hosts=("b",)))
    assert outcome.code == 3 and summary(outcome, PLAN) == "the connection to b was lost"
    assert report(outcome, PLAN)[1].startswith("  b: connection lost, or the launcher there was killed")


def test_a_rank_that_a_rendezvous_has_numbered_says_where_it_is() -> None:
    met = replace(PLAN, rendezvous=("a:1", "slt"), node_rank=0)
    outcome = ended(lost(0), evidence=seen(1, beats={0: Beat(0, "trout", 1, "step", 1.0, 12, 20, 0.0)}))
    assert report(outcome, met)[1:] == [
        "  rank 1 on another host: no report; it was killed or never started",
        "  rank 0 on trout: ended because of that",
    ]


def test_a_launcher_that_fails_after_all_ranks_were_done() -> None:
    assert report(ended(Report(0, 0), Report(1, 0), evidence=seen(7)), PLAN)[0] == (
        "launch failed: the launcher, see its output above (exit code 7)"
    )


@pytest.mark.parametrize("code", [0, 1])
def test_a_launcher_that_ends_without_any_rank(code: int) -> None:
    """Whatever it says of itself, nobody was killed: nobody was there."""
    outcome = verdict({}, 2, Evidence(code))
    assert outcome.code == 3
    text = f"the launcher ended with exit code {code}, but no rank ever reported"
    assert report(outcome, PLAN)[1] == f"  {text}" and summary(outcome, PLAN) == text


def test_no_cause_without_a_failure() -> None:
    assert ended(Report(0, 0), Report(1, 0), evidence=seen(0)).cause is None
    assert summary(Outcome(0, 0), PLAN) == "finished" and summary(Outcome(139, 0), PLAN) == "exit code 139"
