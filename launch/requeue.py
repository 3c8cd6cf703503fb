"""Puts a SLURM job back into the queue when its run has stopped and saved.

SLURM requeues a pre-empted job only if it has to kill it. A batch script that ends by itself within the grace time is
completed, whatever its exit code, and so is one that ends before its time limit.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from launch.slurm import Allocation
from launch.stop import read_request

_SECONDS = 60.0


def requeue(job: Allocation, run_dir: Path, most: int, say: Callable[[str], None]) -> None:
    """Ask SLURM to start this job again, unless a user ends it (`slt launch stop`, `scancel`).

    Args:
        job: in whose batch script this process runs; otherwise nothing is done.
        run_dir: of the run that has saved.
        most: how often a job is started again.
        say: called with what becomes of the job. SLURM then ends this process, perhaps before it learns more.
    """
    if not job.is_batch:
        return
    reason = _why_not(job, run_dir, most)
    if reason:
        say(f"job {job.job_id} is not queued again: {reason}")
        return
    say(f"job {job.job_id} goes back into the queue (start {job.restarts + 2}, at most {most + 1})")
    code, text = _scontrol("requeue", job.job_id)
    if code > 0:  # below: SLURM has ended scontrol together with the job
        say(f"job {job.job_id} is not queued again: {text}; submit it again to go on")


def _why_not(job: Allocation, run_dir: Path, most: int) -> str:
    if (request := read_request(run_dir)) is not None:
        return f"{request.who} asked for its end"
    if job.restarts >= most:
        return f"it was {job.restarts} times, the limit (--max-requeues {most}); submit it again to go on"
    code, text = _scontrol("show", "job", job.job_id, "-o")
    state = next((word.partition("=")[2] for word in text.split() if word.startswith("JobState=")), text)
    return f"its state is {state}" if code or state != "RUNNING" else ""


def _scontrol(*arguments: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, f"scontrol does not answer: {error}"
    return done.returncode, (done.stdout + done.stderr).strip()


__all__ = ["requeue"]
