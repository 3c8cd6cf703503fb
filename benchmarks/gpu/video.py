"""Stages 2 and 3 with a frame tower of DINOv2-small's shape and a 0.5B language model, random weights, bf16, through
our trainer: clips per second with LoRA on the tower, memory against the global batch, the connector on live video
against stored features, generated tokens per second."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import Figure, Probe, run_section, world
from benchmarks.gpu.settings import run_sets
from benchmarks.loops import Run, Timing, make_training, ours
from benchmarks.stage_parts import Parts, extract_features, make_parts


@dataclass(frozen=True)
class Size:
    """Of everything here."""

    llm: dict[str, int]
    backbone: dict[str, int]
    width: int
    heads: int
    pixels: int
    clips: int
    """In the training split of the made corpus."""
    global_batch: int
    micro_batch: int
    steps: int
    memory_batches: tuple[int, ...]
    """Global batches whose peak memory is compared, in micro-batches of `memory_micro`."""
    memory_micro: int
    workers: int


REAL = Size(
    {"width": 1280, "layers": 24, "heads": 20, "feed_forward": 3456, "max_positions": 2048},
    {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518},
    512, 8, 224, 64, 32, 16, 9, (1024, 4096, 16384), 256, 12,
)  # fmt: skip
TOY = Size(
    {"width": 32, "layers": 1, "heads": 2, "feed_forward": 64, "max_positions": 512},
    {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    32, 2, 28, 16, 4, 2, 3, (4, 8), 4, 0,
)  # fmt: skip
BLOCK = 3
CACHED_TARGET, MEMORY_TARGET = 10.0, 1.1
NEW_TOKENS = 32


@dataclass(frozen=True)
class Bench:
    """The made data and models."""

    probe: Probe
    size: Size

    @property
    def parts(self) -> Parts:
        size = self.size
        visual = (
            f"width: {size.width}, max_frames: 256, word: {{heads: {size.heads}}}, sentence: {{heads: {size.heads}}}"
        )
        folder, tokenizer = self.probe.work / "parts", self.probe.work / "world" / "tokenizer"
        return Parts(folder, tokenizer, size.llm, size.backbone, visual, self.probe.device)

    @property
    def form(self) -> list[str]:
        return [f"data.image_pixels={self.size.pixels}", "data.max_frames=256", "data.frame_stride=1"]

    def prepare(self) -> None:
        data = world(self.probe)
        make_parts(self.parts, self.size.pixels, torch.bfloat16)
        sets = [*self.form, "train.precision=bf16"]
        extract_features(self.parts, data / "shards" / "video", sets, max(self.size.workers, 1))

    def run(self, name: str, stage: str, shards: Path, *extra: str) -> Run:
        size, parts = self.size, self.parts
        models = {
            "contrastive": [f"model.text_encoder.path={parts.llm_folder}", "data.unique_texts=false"],
            "connector": [f"model.llm.path={parts.llm_folder}", f"model.visual.path={parts.encoder_folder}"],
        }[stage]
        # many passes an epoch: a global batch may be larger than the made corpus
        source = f"data.train=[{{shards: {shards}, weight: {max(size.memory_batches) // size.clips + 1}}}]"
        sets = [
            *run_sets(self.probe, self.probe.work / "runs" / name, 1, size.steps), source, *self.form,
            f"train.global_batch={size.global_batch}", f"train.micro_batch={size.micro_batch}",
            f"data.workers={size.workers}", *models, *extra,
        ]  # fmt: skip
        return Run(f"demo_{stage}", sets, self.probe.device, 1 if self.probe.dry else BLOCK)

    @property
    def videos(self) -> Path:
        return self.probe.work / "world" / "shards" / "video"

    @property
    def features(self) -> Path:
        return self.parts.folder / "features"


def rate(timing: Timing, items: float, unit: str) -> Figure:
    """``items`` per second of a step."""
    seconds = statistics.median(timing.seconds[1:] or timing.seconds)
    detail = {"seconds_per_step": timing.seconds, "peak_gib": timing.peak_gib, "wait_seconds": timing.wait_seconds}
    return Figure(items / seconds, unit, detail=detail)


def stage_2(bench: Bench) -> None:
    """Clips per second; peak memory of larger and larger global batches."""
    probe, size = bench.probe, bench.size

    def lora() -> Figure:
        run = bench.run("stage2-lora", "contrastive", bench.videos, bench.parts.visual_set("lora"))
        return rate(ours(run), size.global_batch, "clips/s")

    probe.figure("stage 2, LoRA on the tower, live video", lora)
    peaks = []
    for batch in size.memory_batches:

        def memory(batch: int = batch) -> Figure:
            sets = (f"train.global_batch={batch}", f"train.micro_batch={size.memory_micro}", "train.steps=2")
            visual = bench.parts.visual_set("frozen")
            run = bench.run(f"stage2-{batch}", "contrastive", bench.features, visual, *sets)
            timing = ours(dataclasses.replace(run, block=1))
            found = rate(timing, batch, "clips/s")
            return Figure(timing.peak_gib, "GiB", detail={**found.detail, "clips_per_second": found.value})

        row = probe.figure(f"stage 2, peak memory at global batch {batch}", memory)
        peaks.append(row["value"] if row else None)
    if peaks[0] and peaks[-1]:
        growth = Figure(peaks[-1] / peaks[0], "x", MEMORY_TARGET, at_most=True)
        first, last = size.memory_batches[0], size.memory_batches[-1]
        probe.figure(f"stage 2, peak memory at {last} over {first}", lambda: growth)


def stage_3(bench: Bench) -> None:
    """Samples and label tokens per second on live video and on stored features."""
    rates = {}
    for name, shards in (("live video", bench.videos), ("stored features", bench.features)):

        def measure(name: str = name, shards: Path = shards) -> Figure:
            timing = ours(bench.run(f"stage3-{name.split()[0]}", "connector", shards))
            found = rate(timing, bench.size.global_batch, "samples/s")
            tokens = rate(timing, timing.per_step(timing.tokens), "tokens/s")
            return dataclasses.replace(found, detail={**found.detail, "label_tokens_per_second": tokens.value})

        rates[name] = bench.probe.figure(f"stage 3, {name}", measure)
    live, stored = rates["live video"], rates["stored features"]
    if live and stored:
        ratio = Figure(stored["value"] / live["value"], "x", CACHED_TARGET)
        bench.probe.figure("stage 3, stored features over live video", lambda: ratio)


def generation(bench: Bench) -> Figure:
    """New tokens per second of the evaluation during training, greedy, on stored features; padding after an early end
    counts."""
    sets = [
        f"data.eval=[{{shards: {bench.features}}}]", f"connector.max_new_tokens={NEW_TOKENS}",
        "connector.num_beams=1", f"connector.eval_samples={bench.size.clips}",
    ]  # fmt: skip
    run = bench.run("stage3-generate", "connector", bench.features, *sets)
    training = make_training(run.recipe, run.sets, run.device)
    module: Any = training.stage.module
    generate, produced = module.generate, []

    def counted(*arguments: Any, **options: Any) -> Any:
        found = generate(*arguments, **options)
        produced.append(getattr(found, "sequences", found).numel())
        return found

    module.generate = counted
    training.stage.evaluate(training.engine.forward, lambda: False)  # compiles and warms up
    produced.clear()
    start = time.perf_counter()
    training.stage.evaluate(training.engine.forward, lambda: False)
    seconds = time.perf_counter() - start
    training.engine.destroy()
    return Figure(sum(produced) / seconds, "tokens/s", ok=bool(produced), detail={"batches": produced})


def run(probe: Probe) -> None:
    bench = Bench(probe, TOY if probe.dry else REAL)
    bench.prepare()
    stage_2(bench)
    stage_3(bench)
    probe.figure("stage 3, generation", lambda: generation(bench))


if __name__ == "__main__":
    run_section("video", run)
