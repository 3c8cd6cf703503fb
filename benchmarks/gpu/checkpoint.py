"""How long training stands still for a checkpoint: a 0.5B model under ZeRO-1 with fp32 optimizer states."""

from __future__ import annotations

import statistics
from dataclasses import replace

from benchmarks.gpu.llm import SIZES, TOY, run_of
from benchmarks.gpu.rows import Figure, Probe, run_section
from benchmarks.loops import ClockObserver, Timing, fit, make_training, reset_memory

EVERY, STEPS = 4, 5
"""The last step writes one, too, and is not counted."""


def stall(probe: Probe) -> Figure:
    """Seconds that a step with a checkpoint takes longer than the others, and the bytes written."""
    size = replace(TOY if probe.dry else SIZES[0], steps=STEPS)
    run = replace(
        run_of(probe, size, "checkpoint", 1, (f"train.checkpoint={{every_steps: {EVERY}, keep: 1}}",)), block=1
    )
    reset_memory(run.device)
    training, timing = make_training(run.recipe, run.sets, run.device), Timing()
    fit(training, [], [ClockObserver(training, run, timing)], save=True)
    saved = [seconds for step, seconds in enumerate(timing.seconds, 1) if step % EVERY == 0]
    others = [seconds for step, seconds in enumerate(timing.seconds, 1) if step % EVERY and 1 < step < STEPS]
    folders = sorted((training.run_dir / "checkpoints").glob("step-*"))
    gib = sum(file.stat().st_size for file in folders[-1].rglob("*") if file.is_file()) / 2**30
    seconds = statistics.mean(saved) - statistics.median(others)
    detail = {"seconds_of_steps": timing.seconds, "gib": gib, "gib_per_second": gib / seconds}
    return Figure(seconds, "s", detail=detail)


def run(probe: Probe) -> None:
    probe.figure("stall of one checkpoint", lambda: stall(probe))


if __name__ == "__main__":
    run_section("checkpoint", run)
