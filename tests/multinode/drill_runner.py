"""Runs a drill on simulated hosts and compares what happened with what must happen."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.engine.metrics import read_metrics
from tests import ledger
from tests.jobs import World, rows
from tests.multinode.cluster import Cluster
from tests.multinode.drills import Drill, Live, Truth
from tests.multinode.hosts import until

SETTINGS: dict[str, object] = {
    "train__steps": 100, "train__global_batch": 12, "train__checkpoint__every_steps": 10,
    "train__checkpoint__keep": 20, "train__sample_ledger": "true", "train__world_sizes": "[1, 2, 3]",
}  # fmt: skip
"""A global batch that one, two and three ranks divide; long enough for a heartbeat of a rank in training."""


def data_settings(world: World) -> dict[str, object]:
    """The small split as training data: an epoch is two steps."""
    return {"data__train": f"[{{shards: {world.text}, split: dev}}]"}


TO_ROUNDING = 1e-5
"""fp32 sums in another order, over the whole run."""
GONE_SECONDS = 20.0


@dataclass(frozen=True)
class Result:
    """What a drill came to."""

    drill: str
    code: int
    expected_code: int
    cause: str
    """What the launch said of it."""
    diagnosis: dict[str, bool]
    """Whether kind, rank and host of the fault were named, and no others."""
    attempts: list[str]
    """What a launch that restarted by itself said of those that failed."""
    seconds_to_end: float
    """From the fault to the end of the launch it happened to."""
    seconds_to_next_step: float | None
    """From the fault to the next finished step; over a second start, from that start."""
    steps: int
    epochs: int
    ledger: list[str]
    """Samples lost or repeated, steps out of place."""
    loss_difference: float
    bit_equal: bool
    left: list[str]
    """Processes that outlived a launch."""

    def problems(self, drill: Drill) -> list[str]:
        """What is not as it must be."""
        found = [*self.ledger, *(f"left running: {process}" for process in self.left)]
        if self.code != drill.code:
            found.append(f"exit code {self.code}, not {drill.code}")
        found += [f"the diagnosis does not name the {what}" for what, named in self.diagnosis.items() if not named]
        if (drill.bit_equal and not self.bit_equal) or self.loss_difference > TO_ROUNDING:
            found.append(f"losses differ by up to {self.loss_difference:g}")
        if bool(self.attempts) != drill.restarts:
            found.append(f"attempts that ended before the last one: {self.attempts}")
        if not self.epochs:
            found.append("no epoch was finished")
        return found

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def run(drill: Drill, cluster: Cluster, reference: Mapping[int, float]) -> Result:
    """Do it. The cluster's settings are `SETTINGS`, and so were those of the undisturbed run.

    Args:
        drill: from the table.
        cluster: all hosts run, and its folder is new.
        reference: loss per step of the undisturbed run.
    """
    with contextlib.ExitStack() as stack:
        if drill.disk_mib:
            cluster.run_dir.mkdir()
            stack.enter_context(cluster.a.rack.small_disk(cluster.run_dir, drill.disk_mib))
        for host in cluster.hosts:
            stack.callback(host.clear)
        return _Run(drill, cluster).result(reference)


class _Run:
    def __init__(self, drill: Drill, cluster: Cluster) -> None:
        self.drill, self.cluster = drill, cluster
        self.codes: list[int] = []
        self.said: list[str] = []
        self.left: list[str] = []
        self.fault = self.end = self.going_on = 0.0

    def result(self, reference: Mapping[int, float]) -> Result:
        hit, then = self.drill.starts[:-1] or self.drill.starts, self.drill.starts[1:]
        for number, names in enumerate(hit):
            if number:
                self.drill.between(self.cluster)
            self._broken(names, number)
        if then:
            self.drill.between(self.cluster)
            self._undisturbed(then[-1], len(hit))
        causes = [cause for said in self.said for cause in (*_attempts(said), _verdict(said), *said.splitlines())]
        named = [cause for cause in causes if re.search(self.drill.truth.kind, cause)]
        return self._result(reference, named[0] if named else causes[0])

    def _broken(self, names: tuple[str, ...], number: int) -> None:
        cluster, drill = self.cluster, self.drill
        log = f"launch-{number}"
        before = cluster.checkpoints()
        process = cluster.start(names, drill.options, drill.env, log)
        live = Live(cluster, process, cluster.in_training_on(names, process, before, log))
        fault = time.time()
        with drill.inject(live):
            code = _wait(process, drill.seconds, lambda: cluster.said(log))
            end = time.time()
            self._wait_until_gone(live.away)
        self._wait_until_gone()
        if not number:
            self.fault, self.end, self.going_on = fault, end, fault
        said = cluster.said(log)
        if live.refused:
            assert code == 0, said
            code, said = live.refused
        self.codes.append(code)
        self.said.append(said)

    def _undisturbed(self, names: tuple[str, ...], number: int) -> None:
        """The last start: it must finish."""
        self.going_on = time.time()
        log = f"launch-{number}"
        process = self.cluster.start(names, self.drill.options, self.drill.env, log)
        code = _wait(process, 240, lambda: self.cluster.said(log))
        assert code == 0 and "launch finished (exit code 0)" in self.cluster.said(log), self.cluster.said(log)
        self.said.append(self.cluster.said(log))
        self._wait_until_gone()

    def _wait_until_gone(self, away: str = "") -> None:
        """Whatever outlives the launch on a host that can be reached is written down, and ended."""
        with contextlib.suppress(AssertionError):
            until(lambda: not self.cluster.left(away), GONE_SECONDS, "all are gone")
        self.left += self.cluster.left(away)
        for host in self.cluster.hosts:
            if host.name != away:
                host.clear()

    def _result(self, reference: Mapping[int, float], cause: str) -> Result:
        drill, run_dir = self.drill, self.cluster.a.sees(self.cluster.run_dir)
        losses, count = rows(run_dir), ledger.count(run_dir)
        assert losses.keys() == reference.keys(), f"steps {sorted(losses)}"
        following = [row["time"] for row in read_metrics(run_dir) if row["time"] > self.going_on]
        return Result(
            drill=drill.name,
            code=next((code for code in self.codes if code != drill.code), drill.code),
            expected_code=drill.code,
            cause=cause[-1000:],
            diagnosis=_score(drill.truth, cause),
            attempts=[attempt for said in self.said for attempt in _attempts(said)],
            seconds_to_end=round(self.end - self.fault, 1),
            seconds_to_next_step=round(following[0] - self.going_on, 1) if following else None,
            steps=count.steps,
            epochs=count.epochs,
            ledger=count.problems,
            loss_difference=max(abs(losses[step] - loss) for step, loss in reference.items()),
            bit_equal=losses == reference,
            left=self.left,
        )


def _score(truth: Truth, cause: str) -> dict[str, bool]:
    score = {"kind": re.search(truth.kind, cause) is not None}
    if truth.rank is not None:
        score["rank"] = set(re.findall(r"\branks? ([\d,]+) on", cause)) == {str(truth.rank)}
    if truth.host:
        score["host"] = set(re.findall(r"\bhost-[a-z]\b", cause)) == {truth.host}
    return score


def _attempts(output: str) -> list[str]:
    """Why every attempt ended that was followed by another."""
    return re.findall(r"^attempt \d+ .*?exit code \d+, .*?: (.*); attempt \d+ in", output, flags=re.MULTILINE)


def _verdict(output: str) -> str:
    """What a launch says at its end, or why it did not start."""
    lines = output.splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"launch \w+|error", line)]
    return "\n".join(lines[starts[0] :]) if starts else ""


def _wait(process: subprocess.Popen[bytes], seconds: float, said: Any) -> int:
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {seconds:g} s\n{said()}") from None
