"""Runs what an experiment still lacks, by the commands that a user would type; what is finished is not run again."""

from __future__ import annotations

import hashlib
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, SltError, stop_signals
from pipeline.experiment.matrix import Matrix, ScoreSpec
from pipeline.experiment.steps import Step, Trial

logger = logging.getLogger(__name__)

Call = Callable[[Sequence[str]], int]
"""Runs one command line of `slt`; returns its exit code."""
_STOPS = (EXIT_PREEMPTED, EXIT_INTERRUPTED)


class ExperimentStoppedError(SltError):
    """A run was asked to stop and has saved; the same command goes on from there."""

    def __init__(self, folder: Path, code: int) -> None:
        super().__init__(f"{folder}: stopped (exit code {code}); run the same command again to go on")
        self.exit_code = code if code > 0 else EXIT_PREEMPTED


def call_slt(arguments: Sequence[str]) -> int:
    """Run `slt` in a process of its own, with this terminal; signals to stop go to it, so that it can save."""
    process = subprocess.Popen([sys.executable, "-m", "launch", *arguments])

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:  # a terminal sends this one to both
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_trials(matrix: Matrix, trials: list[Trial], call: Call = call_slt) -> list[str]:
    """Train, export and score every trial; returns what failed, in words. An arm that fails does not stop others.

    Raises:
        ExperimentStoppedError: a run was stopped from outside.
    """
    broken: dict[Path, str] = {}
    failures = []
    for number, trial in enumerate(trials, 1):
        logger.info("%d/%d: %s, seed %d", number, len(trials), trial.arm.name, trial.seed)
        failure = _run_trial(matrix, trial, call, broken)
        if failure:
            failures.append(f"{trial.arm.name}, seed {trial.seed}: {failure}")
            logger.error("%s", failures[-1])
    return failures


def _run_trial(matrix: Matrix, trial: Trial, call: Call, broken: dict[Path, str]) -> str:
    """What failed; empty if nothing did."""
    for step in trial.steps:
        if step.folder not in broken and not step.is_exported:
            failure = _train(matrix, step, call)
            if failure:
                broken[step.folder] = failure  # other arms that share it need not try again
        if step.folder in broken:
            return f"step {step.name}: {broken[step.folder]}"
    for score in matrix.scores:
        if score.shards is not None and not (folder_of(matrix, trial, score) / "scores.json").is_file():
            code = call(_evaluate(matrix, trial, score))
            if code in _STOPS or code == -signal.SIGTERM:
                raise ExperimentStoppedError(folder_of(matrix, trial, score), code)
            if code:
                return f"score {score.name} ended with exit code {code}"
    return ""


def _train(matrix: Matrix, step: Step, call: Call) -> str:
    options = [word for name, value in matrix.launch.items() for word in _option(name, value)]
    sets = [word for text in (f"run_dir={step.folder}", *step.sets) for word in ("--set", text)]
    code = call(["launch", "run", step.recipe, *options, *sets])
    if code in _STOPS:
        raise ExperimentStoppedError(step.folder, code)
    if code:
        return f"training ended with exit code {code}; its log is {step.folder / 'logs'}"
    code = call(["export", str(step.folder), "--out", str(step.export)])
    return f"its export ended with exit code {code}" if code else ""


def _option(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else []
    return [word for item in (value if isinstance(value, list) else [value]) for word in (flag, str(item))]


def _evaluate(matrix: Matrix, trial: Trial, score: ScoreSpec) -> list[str]:
    assert score.shards is not None
    sets = [word for name, value in score.options.items() for word in ("--set", f"{name}={value}")]
    sets += [word for shards in score.pose for word in ("--pose", shards)]
    return [
        "evaluate", str(trial.step(score.step).export), "--shards", score.shards, "--split", score.split,
        "--protocol", score.protocol, "--out", str(folder_of(matrix, trial, score)), *sets,
    ]  # fmt: skip


def folder_of(matrix: Matrix, trial: Trial, score: ScoreSpec) -> Path:
    """Where the predictions of a trial for a score are. Named after the step, because other arms may share it, and
    after what is translated how, so that a changed score meets no old predictions."""
    how = score.model_dump_json(exclude={"name", "step", "metric"})
    digest = hashlib.sha256(how.encode()).hexdigest()[:8]
    return Path(matrix.out) / "scores" / f"{score.name}-{digest}-{trial.step(score.step).folder.name}"
