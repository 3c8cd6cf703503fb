"""Running the three stages for the demo: the same launcher, recipes, export and evaluation a user would type."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.engine.metrics import read_metrics
from pipeline.errors import SltError

logger = logging.getLogger(__name__)


class StageFailedError(SltError):
    """A stage of the demo ended with an error; carries its exit code."""

    def __init__(self, stage: str, code: int, log: Path) -> None:
        super().__init__(f"stage {stage} ended with exit code {code}; its log is {log}")
        self.exit_code = code


@dataclass(frozen=True, slots=True)
class StageRun:
    """A finished and exported stage."""

    stage: str
    run_dir: Path
    export_dir: Path
    seconds: float

    def evaluations(self) -> list[dict[str, float]]:
        """Rows with held-out metrics, first to last."""
        return [row for row in read_metrics(self.run_dir) if any(name.startswith("eval/") for name in row)]


def run_stage(stage: str, run_dir: Path, num_procs: int, sets: list[str], recipe: str = "") -> StageRun:
    """Launch one stage through DeepSpeed's launcher, then export its best checkpoint.

    Raises:
        StageFailedError: training or export failed.
    """
    start = time.monotonic()
    name = recipe or f"demo_{stage}"
    overrides = [f"run_dir={run_dir}", f"train.world_sizes=[{num_procs}]", *sets]
    command = [sys.executable, "-m", "launch", "launch", "run", name, "--num-procs", str(num_procs)]
    command += ["--accelerator", "cpu"]  # runs on any machine, with any number of GPUs
    for override in overrides:
        command += ["--set", override]
    _run(stage, command, run_dir)
    export_dir = run_dir / "export"
    _run(stage, [sys.executable, "-m", "launch", "export", str(run_dir), "--out", str(export_dir)], run_dir)
    return StageRun(stage, run_dir, export_dir, time.monotonic() - start)


def is_exported(run_dir: Path) -> bool:
    """Whether a stage was finished and exported there (an export is complete or absent)."""
    return (run_dir / "export" / "provenance.json").is_file()


def run_stage_once(stage: str, run_dir: Path, num_procs: int, sets: list[str], recipe: str = "") -> Path:
    """`run_stage`, unless an earlier call finished it there; returns the export. Name the folder after the settings."""
    if not is_exported(run_dir):
        run_stage(stage, run_dir, num_procs, sets, recipe)
    return run_dir / "export"


def _run(stage: str, command: list[str], run_dir: Path) -> None:
    logger.debug("running %s", " ".join(command))
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise StageFailedError(stage, code, run_dir / "logs")
