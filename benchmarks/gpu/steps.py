"""What a step of every stage waits for and does: host synchronisations with the line that asks for each, and
the ten costliest kernels and CPU calls. Small models: the count of a step does not depend on the width."""

from __future__ import annotations

import collections
import contextlib
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.rows import ROOT, Figure, Probe, run_section, world
from benchmarks.gpu.settings import run_sets
from benchmarks.gpu.stages import LLM, STAGES, VISUAL
from benchmarks.loops import fit, make_training
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.training import Training

COUNTED_STEP, PROFILED_STEP, STEPS = 3, 4, 6
TOP = 10
WAITS_TARGET = 1
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
"""Operations whose result the host needs before it can go on: on a CPU the stand-in for synchronisations."""


def our_line() -> str:
    """The innermost line of this project on the stack."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.parent.name != "gpu" and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"


class CountedWaits(TorchDispatchMode):
    """Counts the operations of `WAITS` by the line that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in WAITS:
            self.lines[our_line()] += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def synchronisations(probe: Probe) -> Iterator[collections.Counter[str]]:
    """Counts what makes the host wait for the device, by line."""
    if probe.dry:
        with CountedWaits() as counted:
            yield counted.lines
        return
    lines: collections.Counter[str] = collections.Counter()

    def tell(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if "synchroniz" in str(message):
            lines[our_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = tell
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Watch(Observer):
    """Counts one whole step, from the agreement between ranks to the optimizer, and profiles the next."""

    lines: collections.Counter[str]
    profiler: profile

    def __init__(self, training: Training, probe: Probe) -> None:
        super().__init__(training)
        self.probe, self.watching = probe, contextlib.ExitStack()

    def vote(self) -> int:
        step = self.training.state.step
        if step == COUNTED_STEP:
            self.lines = self.watching.enter_context(synchronisations(self.probe))
        if step == PROFILED_STEP:
            activities = [ProfilerActivity.CPU] + ([] if self.probe.dry else [ProfilerActivity.CUDA])
            self.profiler = self.watching.enter_context(profile(activities=activities))
        return 0

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
        if self.training.state.step == PROFILED_STEP + 1 and not self.probe.dry:
            torch.cuda.synchronize()
        self.watching.close()
        return {}


def top(profiler: Any, attribute: str) -> list[dict[str, Any]]:
    """The costliest entries of a profiled step, milliseconds."""
    entries = sorted(profiler.key_averages(), key=lambda entry: -getattr(entry, attribute))[:TOP]
    milliseconds = [(entry.key[:90], getattr(entry, attribute) / 1e3, entry.count) for entry in entries]
    return [{"name": name, "ms": round(spent, 3), "calls": calls} for name, spent, calls in milliseconds if spent > 0]


def sets(probe: Probe, stage: str) -> list[str]:
    data, exports = world(probe), probe.work / "runs" / "reference"
    shards = data / "shards" / ("text" if stage == STAGES[0] else "video")
    llm, visual = (str(exports / name / "export") for name in STAGES[:2])
    fresh_llm = f"model.llm={LLM.replace('TOKENIZER', str(data / 'tokenizer'))}"
    models = {
        "continued_pretraining": [fresh_llm, "data.block_tokens=128"],
        "contrastive": [f"model.visual={VISUAL}", f"model.text_encoder.path={llm}", "contrastive.embed=64"],
        "connector": [f"model.llm.path={llm}", f"model.visual.path={visual}"],
    }[stage]
    return [
        *run_sets(probe, probe.work / "runs" / f"watched-{stage}", 3, STEPS), f"data.train=[{{shards: {shards}}}]",
        "data.workers=0", "train.global_batch=8", "train.micro_batch=4", *models,
    ]  # fmt: skip


def run(probe: Probe) -> None:
    for stage in STAGES:
        training = make_training(f"demo_{stage}", sets(probe, stage), probe.device)
        watch = Watch(training, probe)
        fit(training, [watch], [])
        lines = dict(watch.lines.most_common())
        waits = Figure(sum(lines.values()), "", WAITS_TARGET, at_most=True, detail={"by_line": lines})
        probe.figure(f"{stage} host synchronisations a step", lambda waits=waits: waits)
        kernels = "self_cpu_time_total" if probe.dry else "self_device_time_total"
        for name, attribute in (("kernels", kernels), ("CPU calls", "self_cpu_time_total")):
            entries = top(watch.profiler, attribute)
            first = f"{entries[0]['name'][:40]} {entries[0]['ms']} ms" if entries else "none"
            probe.add(f"{stage} {name}", bool(entries), first, top=entries)


if __name__ == "__main__":
    run_section("steps", run)
