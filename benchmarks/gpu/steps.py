"""What a step of every stage waits for and does: host synchronisations with the line that asks for each, and
the ten costliest kernels and CPU calls. Small models: the count of a step does not depend on the width."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.rows import Figure, Probe, run_section, world
from benchmarks.gpu.settings import run_sets
from benchmarks.gpu.stages import LLM, STAGES, VISUAL
from benchmarks.gpu.waits import Lines, counted
from benchmarks.loops import fit, make_training
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.training import Training

COUNTED_STEP, PROFILED_STEP, STEPS = 3, 4, 6
TOP = 10
WAITS_TARGET = 1


class Watch(Observer):
    """Counts one whole step, from its copy to the device to the optimizer, and profiles the next."""

    lines: Lines
    profiler: profile

    def __init__(self, training: Training, probe: Probe) -> None:
        super().__init__(training)
        self.probe, self.watching = probe, contextlib.ExitStack()

    def vote(self) -> int:
        if self.training.state.step == PROFILED_STEP:
            activities = [ProfilerActivity.CPU] + ([] if self.probe.dry else [ProfilerActivity.CUDA])
            self.profiler = self.watching.enter_context(profile(activities=activities))
        return 0

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
        if self.training.state.step == PROFILED_STEP + 1 and not self.probe.dry:
            torch.cuda.synchronize()
        self.watching.close()
        if self.training.state.step == COUNTED_STEP:
            self.lines = self.watching.enter_context(counted(self.training.engine.engine, self.training.device))
        return {}


def top(profiler: Any, attribute: str) -> list[dict[str, Any]]:
    """The costliest entries of a profiled step, milliseconds."""
    entries = sorted(profiler.key_averages(), key=lambda entry: -getattr(entry, attribute))[:TOP]
    milliseconds = [(entry.key[:90], getattr(entry, attribute) / 1e3, entry.count) for entry in entries]
    return [{"name": name, "ms": round(spent, 3), "calls": calls} for name, spent, calls in milliseconds if spent > 0]


def sets(probe: Probe, stage: str, zero: int = 3) -> list[str]:
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
        *run_sets(probe, probe.work / "runs" / f"watched-{stage}-zero{zero}", zero, STEPS),
        f"data.train=[{{shards: {shards}}}]", "data.workers=0", "train.global_batch=8", "train.micro_batch=4", *models,
    ]  # fmt: skip


def run(probe: Probe) -> None:
    for zero, stage in itertools.product((1, 3), STAGES):  # a run under ZeRO-3 is still there when the next is built
        training = make_training(f"demo_{stage}", sets(probe, stage, zero), probe.device)
        watch = Watch(training, probe)
        fit(training, [watch], [])
        lines = dict(watch.lines.most_common())
        # under ZeRO-3 DeepSpeed waits for its own streams: after every backward pass, and alone for every gathering
        target = WAITS_TARGET if zero == 1 else None
        waits = Figure(sum(lines.values()), "", target, at_most=True, detail={"by_line": lines})
        probe.figure(f"{stage} zero{zero} host synchronisations a step", lambda waits=waits: waits)
        kernels = "self_cpu_time_total" if probe.dry else "self_device_time_total"
        for name, attribute in (("kernels", kernels), ("CPU calls", "self_cpu_time_total")):
            entries = top(watch.profiler, attribute)
            first = f"{entries[0]['name'][:40]} {entries[0]['ms']} ms" if entries else "none"
            probe.add(f"{stage} zero{zero} {name}", bool(entries), first, top=entries)


if __name__ == "__main__":
    run_section("steps", run)
