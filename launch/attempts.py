"""Runs a launch with all its attempts: what failed for the infrastructure's sake is planned and started again."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launch.hang import Limits
from launch.health import check_health, health_level
from launch.joined import follow, lead
from launch.lock import hold
from launch.memory import check_memory
from launch.plan import LaunchPlan
from launch.preflight import UnfitHostsError, check_hosts
from launch.prepare import Prepared, command_of, prepare_again
from launch.processes import Patience, end_orphans, signal_hosts
from launch.ready import ready
from launch.recovery import Attempt, RestartPolicy, next_attempt
from launch.report import report, summary
from launch.run_options import RunOptions
from launch.signals import StopBeforeStart, StoppedBeforeStart
from launch.status import Journal
from launch.stop import forget_request
from launch.supervise import Watch, log_name, supervise
from launch.verdict import Outcome
from pipeline.config.recipe_file import write_resolved
from pipeline.errors import EXIT_CLUSTER, ClusterError, RecipeError

log = logging.getLogger(__name__)

ATTEMPT = "SLT_ATTEMPT"
"""Environment variable of every rank: the number of its attempt, from 1."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Care:
    """How a launch is looked after."""

    patience: Patience = field(default_factory=Patience)
    limits: Limits = field(default_factory=Limits)
    policy: RestartPolicy = field(default_factory=RestartPolicy)


@dataclass(frozen=True, slots=True)
class Finished:
    """How a launch ended."""

    code: int
    lines: list[str]
    """For people."""
    run_dir: Path


def run(
    options: RunOptions, care: Care, early: StopBeforeStart, say: Callable[[str], None], started: Prepared
) -> Finished:
    """Run a launch that is prepared, attempt after attempt, while its run directory is locked.

    Args:
        options: of the launch; a restart plans with them again.
        care: patience and policy.
        early: signals between attempts.
        say: shows a line.
        started: the first attempt.

    Raises:
        SltError: the first attempt cannot start, or a request to stop arrived between two.
    """
    plan = started.plan
    if plan.node_rank is not None:  # one launcher alone cannot restart the ranks of all
        care = dataclasses.replace(care, policy=RestartPolicy(max_restarts=0))
    if not plan.leads:
        follow(started.resolved, plan.run_dir)
        journal = Journal(plan.run_dir, plan.launch_id)
        return _Attempts(options, care, early, say, journal).run(ready(started, options))
    command = started.command
    with hold(plan.run_dir, plan.launch_id, lambda launch_id: end_orphans(launch_id, command, care.patience)):
        forget_request(plan.run_dir)
        if plan.node_rank is not None:
            lead(started.resolved, plan.run_dir)
        started = ready(started, options)
        plan = started.plan
        journal = Journal(plan.run_dir, plan.launch_id)
        with journal.keeping(), _last_words(journal):
            return _Attempts(options, care, early, say, journal).run(started)


@contextmanager
def _last_words(journal: Journal) -> Iterator[None]:
    """An error that ends the launch is also what its status says."""
    try:
        yield
    except Exception as error:
        journal.set(state="ended", code=getattr(error, "exit_code", 1), message=str(error))
        raise


class _Attempts:
    def __init__(
        self, options: RunOptions, care: Care, early: StopBeforeStart, say: Callable[[str], None], journal: Journal
    ) -> None:
        self.options, self.care, self.early, self.say, self.journal = options, care, early, say, journal
        self.history: list[Attempt] = []

    def run(self, prepared: Prepared) -> Finished:
        first, hosts = prepared, len(prepared.plan.hosts)
        outcome = self._attempt(prepared)
        while not isinstance(step := next_attempt(self.care.policy, self.history, hosts), str):
            self._wait(step.delay_seconds)
            again = self._prepare_again(step.without, first)
            if again is not None:
                prepared = again
                outcome = self._attempt(prepared)
        lines = report(outcome, prepared.plan)
        if self.history[-1].hosts == ():  # the last restart found no hosts
            lines = [f"launch failed: {self.history[-1].cause} (exit code {EXIT_CLUSTER})"]
        lines += [f"  {attempt}" for attempt in self.history] if len(self.history) > 1 else []
        lines += [f"  {step}"] if step else []
        code = self.history[-1].code
        self.journal.set(state="ended", code=code, message=lines[0])
        return Finished(code, lines, first.plan.run_dir)

    def _attempt(self, prepared: Prepared) -> Outcome:
        number, plan = len(self.history) + 1, prepared.plan
        plan = dataclasses.replace(plan, env={**plan.env, ATTEMPT: str(number)})
        command = command_of(self.options, plan)
        if plan.node_rank is None:  # else it is there already
            write_resolved(prepared.resolved, plan.run_dir)
        self._note(plan, f"attempt {number} of launch {plan.launch_id}: {plan.world_size} ranks on {plan.where}")
        self.journal.set(attempt=number, state="starting")
        part = None if plan.node_rank is None else (plan.node_rank, plan.own_hosts[0].slots)
        limits = dataclasses.replace(self.care.limits, hears_all=part is None)
        watch = Watch(self.journal, _known_hosts(plan), limits, part)
        before = newest_checkpoint(plan.run_dir)
        outcome = supervise(command, plan.run_dir, (plan.launch_id, plan.world_size), self.care.patience, watch)
        self.early.over = True
        self._remember(
            code=outcome.code, cause=summary(outcome, plan), hosts=tuple(host.name for host in plan.hosts),
            lost_hosts=outcome.lost_hosts, requested=bool(outcome.signals), step=outcome.step,
            saved_before=before, saved=newest_checkpoint(plan.run_dir),
        )  # fmt: skip
        return outcome

    def _remember(self, **how: object) -> None:
        self.history.append(Attempt(len(self.history) + 1, **how))  # type: ignore[arg-type]

    def _wait(self, seconds: float) -> None:
        last = self.history[-1]
        self.say(f"{last}; attempt {last.number + 1} in {seconds:g} s")
        restarts = [{**dataclasses.asdict(one), "attempt": one.number} for one in self.history]
        self.journal.set(state=f"waiting {seconds:g} s before attempt {last.number + 1}", restarts=restarts)
        self.early.work = "between two attempts, " + (
            f"saved at step {last.saved}" if last.saved is not None else "nothing saved yet"
        )
        self.early.over = False
        if self.early.late is not None:
            raise StoppedBeforeStart(self.early.late, self.early.work)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._obey_request()
            time.sleep(_POLL_SECONDS)
        self._obey_request()

    def _obey_request(self) -> None:
        if self.journal.request is not None:
            raise StoppedBeforeStart(signal.SIGTERM, self.early.work)

    def _prepare_again(self, without: Collection[str], first: Prepared) -> Prepared | None:
        """The next attempt on the hosts that answer; None if they are too few, which is an attempt that failed."""
        excluded, policy = set(without), self.care.policy
        try:
            while True:
                again = prepare_again(self.options, first, excluded, policy.min_hosts)
                if again.command.remote is not None:  # a host that was out of reach may still run its old ranks
                    signal_hosts(again.command, first.plan.launch_id, "SIGKILL", "--all")
                try:
                    self._look_again(again)
                    return again
                except UnfitHostsError as error:
                    self.say(f"without {', '.join(error.hosts)}: {error}")
                    excluded |= set(error.hosts)
        except ClusterError as error:
            saved = newest_checkpoint(first.plan.run_dir)
            self._remember(code=EXIT_CLUSTER, cause=str(error), saved_before=saved, saved=saved)
            return None

    def _look_again(self, again: Prepared) -> None:
        """The checks before a start, of hosts that a fault may have changed.

        Raises:
            ClusterError: hosts cannot take part or are too few for the model, or a port is still in use.
        """
        try:
            check_memory(again.plan, again.resolved)  # fewer ranks keep more each
            check_hosts(again.command, again.plan, again.resolved.recipe)
            check_health(again.command, again.plan, health_level(self.options.health, again.plan))
        except RecipeError as error:
            raise ClusterError(str(error)) from error

    def _note(self, plan: LaunchPlan, line: str) -> None:
        """A line in the launch's log, between the output of the attempts."""
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        log.debug(line)
        path = self.journal.run_dir / "logs" / log_name(plan.node_rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{now} {line}\n")
        except OSError as error:
            log.warning("%s cannot be written (%s); output goes to stderr only", path, error.strerror)


def newest_checkpoint(run_dir: Path) -> int | None:
    """Step of the newest complete checkpoint of a run directory."""
    marks = (run_dir / "checkpoints").glob("step-*/COMPLETE")
    steps = [mark.parent.name.removeprefix("step-") for mark in marks]
    return max((int(step) for step in steps if step.isdigit()), default=None)


def _known_hosts(plan: LaunchPlan) -> dict[int, str]:
    """Rank -> host, of the ranks that are heard here; a rendezvous numbers them itself."""
    own = {host.name for host in plan.own_hosts} if plan.rendezvous is None else set()
    return {rank.rank: rank.host for rank in plan.ranks if rank.host in own}


__all__ = ["ATTEMPT", "Care", "Finished", "newest_checkpoint", "run"]
