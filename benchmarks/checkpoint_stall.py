"""What a checkpoint costs the training: written in the background against written at once, in turns in the same run.

    python benchmarks/checkpoint_stall.py [--quick] [--rounds N] [--zero 1|3] [--out FILE]

Two ranks on this machine's CPU train a language model of 25 million parameters, whose checkpoint has about 350 MB, with
the real engine and the real observer. A stall is all the time the training thread spends on a checkpoint: the
snapshot, exchanges between ranks, and waits for the write. Checkpoints amid training hold no live outputs; only the
last one does, whose forward pass is ``probe`` in the receipt. Disturbance of the steps by the writer, which shares the
cores here, is told apart from it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from receipt import ROOT, Claim, write_receipt

sys.path.insert(0, str(ROOT))
from pipeline import dist
from pipeline.demo.data import prepare as prepare_data
from pipeline.demo.settings import SMOKE
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from tests.jobs import World
from tests.ranks import run_ranks

STAGE = "continued_pretraining"
LLM = "{tiny: {width: 512, layers: 8, heads: 8, feed_forward: 2048, max_positions: 256}, tokenizer: TOKENIZER}"
SMALL = "{tiny: {width: 64, layers: 2, heads: 2, feed_forward: 256, max_positions: 256}, tokenizer: TOKENIZER}"
APART_STEPS = 8
"""From one checkpoint to the next: the write ends meanwhile."""


@dataclass
class Figures:
    """Of rank 0, in seconds unless named otherwise."""

    stalls: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    """By whether it was written in the background."""
    writes: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    steps: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    """By whether a checkpoint was being written."""
    probes: list[float] = field(default_factory=list)
    snapshot_bytes: int = 0
    """Host memory of both ranks' snapshots."""
    checkpoint_bytes: int = 0
    export_files_seconds: float = 0.0


class Turns(Observer):
    """The observer that saves, in turns in both ways, and its clocks."""

    def __init__(self, training: Any) -> None:
        from pipeline.engine.observers.save import Save

        super().__init__(training)
        self.save, self.figures = Save(training), Figures()
        self.number, self.writing, self.began = 0, False, time.monotonic()
        probe = training.stage.probe

        def timed(model: Any) -> Any:
            began = time.monotonic()
            outputs = probe(model)
            self.figures.probes.append(time.monotonic() - began)
            return outputs

        training.stage.probe = timed

    def vote(self) -> int:
        return self.save.vote()

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
        self.figures.steps[self.writing].append(time.monotonic() - self.began)
        saver, taken = self.save.saver, self.training.state.step
        if taken % APART_STEPS == 0:
            saver.background = self.number % 2 == 0
            self.number += 1
        metrics = self.save.on_step(step, wishes, votes)
        if metrics:
            self.figures.stalls[saver.background].append(metrics["checkpoint/stall_seconds"])
            self.figures.writes[saver.background].append(metrics["checkpoint/write_seconds"])
        self.writing = saver.pending
        self.began = time.monotonic()
        return {}


def measure(rank: int, world_size: int, sets: list[str]) -> Figures:
    """One run; each of its ranks."""
    import deepspeed

    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve
    from pipeline.engine.checkpoint import list_checkpoints
    from pipeline.engine.phases import Phases
    from pipeline.engine.prepare import prepare
    from pipeline.engine.saving.files import export_files
    from pipeline.engine.signals import StopFlag
    from pipeline.engine.trainer import Trainer
    from pipeline.stages.registry import stage_class

    dist.init()
    deepspeed.init_distributed(verbose=False)  # before ZeRO-3 builds the model: the group is there, DeepSpeed looks
    resolved = resolve(load_recipe(f"demo_{STAGE}", sets), world_size)
    run_dir, ranks = Path(resolved.recipe.run_dir), dist.ranks_from_environment()
    device = dist.device_for(ranks)
    training = prepare(resolved, stage_class(STAGE), ranks, device, StopFlag(), Phases())
    turns = Turns(training)
    Trainer(training, [turns], []).fit()
    figures = turns.figures
    figures.snapshot_bytes = sum(dist.gather_objects(turns.save.saver.buffers.size))
    figures.checkpoint_bytes = sum(part["size"] for part in list_checkpoints(run_dir)[-1].manifest["parts"].values())
    began = time.monotonic()
    export_files(training.stage, run_dir / f"again-{rank}")
    figures.export_files_seconds = time.monotonic() - began
    training.engine.destroy()
    return figures


def claims(figures: Figures, about: dict[str, Any]) -> list[Claim]:
    first, *background = figures.stalls[True]
    at_once = figures.stalls[False]
    stall, whole = statistics.median(background), statistics.median(at_once)
    megabytes = figures.checkpoint_bytes / 1e6
    step, disturbed = (statistics.median(figures.steps[writing]) for writing in (False, True))
    detail = {
        **about, "checkpoint_mb": round(megabytes, 1), "first_stall": first, "background_stalls": background,
        "stalls_at_once": at_once, "background_writes": figures.writes[True], "writes_at_once": figures.writes[False],
        "probe": statistics.median(figures.probes), "export_files_once": figures.export_files_seconds,
    }  # fmt: skip
    memory = figures.snapshot_bytes / figures.checkpoint_bytes
    name = f"stall per checkpoint of {megabytes:.0f} MB, background against at once"
    return [
        Claim(name, stall, whole, whole / stall, 10, "s", len(background), False, detail),
        Claim("stall of the first one, whose host memory is new", first, whole, whole / first, 1, "s", 1, False),
        Claim("host memory of the snapshots, per byte of the checkpoint", memory, None, None, 1.05, "x", 1, False),
        Claim("a step while one is written, against others", disturbed, step, step / disturbed, 0.4, "s",
              len(figures.steps[True]), False),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of a hundredth of the size, few checkpoints")
    parser.add_argument("--rounds", type=int, default=6, help="checkpoints in each way, besides a first one")
    parser.add_argument("--zero", type=int, default=3, choices=(1, 3), help="ZeRO stage")
    parser.add_argument("--out", type=Path, help="receipt to write")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name) / "world")
        prepare_data(world.root, SMOKE, seed=0, workers=1)
        llm = (SMALL if options.quick else LLM).replace("TOKENIZER", str(world.tokenizer))
        sets = world.sets(
            STAGE, Path(name) / "run", 2, model__llm=llm,
            train__precision="bf16", train__global_batch=2, train__micro_batch=1, data__eval="[]",
            train__steps=APART_STEPS * (2 * rounds + 2), train__checkpoint__every_steps=APART_STEPS,
            deepspeed__overrides=f"{{zero_optimization: {{stage: {options.zero}}}}}",
        )  # fmt: skip
        figures = run_ranks(measure, 2, sets, timeout=1800)[0]
    write_receipt(claims(figures, {"zero_stage": options.zero, "ranks": 2}), options.out, ["torch", "deepspeed"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
