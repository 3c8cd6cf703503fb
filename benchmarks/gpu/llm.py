"""Stage 1 of Llama-shaped models with random weights, packs of 4,096 tokens of documents with real lengths, bf16:
tokens per second, MFU and peak memory of our trainer, with every kernel and compile option the recipe knows, beside a
bare DeepSpeed loop, plain PyTorch and Hugging Face's Trainer over the same batches; FP8 linear layers as a trial."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import memory
from benchmarks.gpu.fp8 import use_fp8
from benchmarks.gpu.lengths import draw
from benchmarks.gpu.rows import Figure, Probe, one_at_a_time, run_section
from benchmarks.gpu.settings import has_field, run_sets
from benchmarks.hf_trainer import hugging_face
from benchmarks.loops import Run, Timing, bare, ours, plain
from pipeline.errors import RecipeError

RECIPE = "demo_continued_pretraining"


@dataclass(frozen=True)
class Size:
    """A model, what one step of it holds, and what it must reach."""

    name: str
    model: str
    tokens_per_second: float
    mfu: float
    block_tokens: int = 4096
    global_batch: int = 8
    micro_batch: int = 4
    steps: int = 12
    vocabulary: int = 32000


SIZES = (
    Size("0.5B", "{width: 1280, layers: 24, heads: 20, feed_forward: 3456, max_positions: 4096}", 60_000, 0.0),
    Size("1.3B", "{width: 2048, layers: 24, heads: 16, feed_forward: 5504, max_positions: 4096}", 48_000, 50.0),
)
TOY = Size("toy", "{width: 32, layers: 1, heads: 2, feed_forward: 64, max_positions: 128}", 0, 0.0, 128, 4, 2, 4, 200)
BLOCK = 4
"""Steps timed together; the first block is warm-up."""


def tokenizer_folder(probe: Probe, vocabulary: int) -> Path:
    """A tokenizer of made-up words: the head's share of the work needs a vocabulary of real size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with one_at_a_time(probe, f"words-{vocabulary}") as folder:
        if not folder.is_dir():
            words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{number}" for number in range(vocabulary - 4))]
            made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
            made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
            PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


def text_shards(probe: Probe, size: Size) -> Path:
    """Documents of random words, as long as those of PHOENIX-2014T and How2Sign, enough for every step."""
    from shards.build.build import BuildOptions, build
    from shards.corpora.text import Text

    tokens = size.block_tokens * size.global_batch * (size.steps + 2)
    folder = probe.work / f"text-{size.vocabulary}-{tokens}"
    if not folder.is_dir():
        chance, rows = random.Random(0), []
        lengths = iter([n for pair in zip(*(draw(f"{c}_tokens", tokens // 16) for c in CORPORA)) for n in pair])  # noqa: B905
        while tokens > 0:
            length = min(next(lengths), size.block_tokens // 2)
            rows.append(" ".join(f"w{chance.randrange(size.vocabulary - 4)}" for _ in range(length)))
            tokens -= length
        source = probe.work / f"{folder.name}.jsonl"
        source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
        corpus = Text(paths={"train": str(source)}, templates=["{text}"], language="en")
        build(corpus, folder, BuildOptions(tokenizer=str(tokenizer_folder(probe, size.vocabulary))), 1)
    return folder


CORPORA = ("phoenix", "how2sign")


def run_of(probe: Probe, size: Size, name: str, zero: int, extra: tuple[str, ...] = ()) -> Run:
    tokenizer, shards = tokenizer_folder(probe, size.vocabulary), text_shards(probe, size)
    sets = [
        *run_sets(probe, probe.work / "runs" / f"llm-{size.name}-{name}", zero, size.steps),
        f"model.llm={{tiny: {size.model}, tokenizer: {tokenizer}}}", f"data.train=[{{shards: {shards}}}]",
        f"data.block_tokens={size.block_tokens}", f"train.global_batch={size.global_batch}",
        f"train.micro_batch={size.micro_batch}", "data.workers=1", *extra,
    ]  # fmt: skip
    return Run(RECIPE, sets, probe.device, 2 if probe.dry else BLOCK)


def figures(
    probe: Probe, size: Size, title: str, timing: Callable[[], Timing], targets: bool = False, optional: bool = False
) -> dict[str, Any] | None:
    """Tokens per second as the figure `title`, MFU as another beside it; the row of the first.

    Args:
        targets: the size's targets are for this loop.
        optional: a recipe that this machine cannot take is no failure.
    """
    tokens_target, mfu_target = (size.tokens_per_second, size.mfu) if targets else (0.0, 0.0)

    def measure() -> Figure:
        try:
            found = timing()
        except RecipeError as error:
            if not optional:
                raise
            return Figure("not here", detail={"reason": str(error)})
        seconds = statistics.median(found.seconds[1:] or found.seconds)
        detail = {"seconds_per_step": found.seconds, "peak_gib": found.peak_gib, "wait_seconds": found.wait_seconds}
        if found.flops and (peak := peak_tflops(probe)):
            detail["mfu_percent"] = found.per_step(found.flops) / seconds / (peak * 1e10)
        return Figure(found.per_step(found.tokens) / seconds, "tokens/s", tokens_target or None, detail=detail)

    row = probe.figure(title, measure)
    if row is None or not isinstance(row["value"], float):
        return None
    if "mfu_percent" in row["detail"]:
        probe.figure(f"{title}, MFU", lambda: Figure(row["detail"]["mfu_percent"], "%", mfu_target or None))
    return row


def peak_tflops(probe: Probe) -> float | None:
    """Of the data sheet; 1 on a CPU, so that the arithmetic runs there."""
    import torch

    from pipeline.engine.metrics import data_sheet_tflops

    return 1.0 if probe.dry else data_sheet_tflops(torch.cuda.get_device_name())


@dataclass
class Measured:
    """A size, and what its parts found."""

    probe: Probe
    size: Size
    mine: dict[str, Any] | None = None
    """The row of our trainer under ZeRO-1."""

    def run(self, name: str, zero: int = 1, *extra: str) -> Run:
        return run_of(self.probe, self.size, name, zero, extra)

    def ours(self, zero: int) -> dict[str, Any] | None:
        run, title = self.run(f"ours-zero{zero}", zero), f"{self.size.name} zero{zero}, our trainer"
        return figures(self.probe, self.size, title, lambda: ours(run), targets=True)

    def option(self, name: str, *sets: str) -> None:
        run = self.run(name.replace(" ", "-"), 1, *sets)
        figures(self.probe, self.size, f"{self.size.name} zero1, {name}", lambda: ours(run), optional=True)

    def beside(self, peer: str, timing: Callable[[], Timing], target: float = 0.0) -> None:
        """A peer, and how our time of a step compares."""
        found = figures(self.probe, self.size, f"{self.size.name} zero1, {peer}", timing)
        if self.mine is not None and found is not None:
            ratio = Figure(found["value"] / self.mine["value"], "x", target or None, at_most=True)
            self.probe.figure(f"{self.size.name} our time of a step over that of {peer}", lambda: ratio)

    def planned(self, zero: int, row: dict[str, Any] | None) -> None:
        if row is not None:
            run = self.run("planned", zero)
            memory.compare(self.probe, f"{self.size.name} zero{zero}", run, row["detail"]["peak_gib"])


def trainer_and_bare(here: Measured) -> None:
    here.mine = here.ours(1)
    here.beside("bare DeepSpeed loop", lambda: bare(here.run("bare")), 1.03)
    here.planned(1, here.mine)


def sharded(here: Measured) -> None:
    here.planned(3, here.ours(3))


def kernels(here: Measured) -> None:
    here.option("liger kernels", "model.kernels=liger")
    here.option("torch kernels", "model.kernels=torch")


def peers(here: Measured) -> None:
    here.beside("plain PyTorch", lambda: plain(here.run("plain")))
    here.beside("Hugging Face Trainer", lambda: hugging_face(here.run("trainer", 1, "model.kernels=torch")))
    here.beside("bare DeepSpeed loop with FP8", lambda: bare(here.run("fp8"), use_fp8))


def compiled(here: Measured) -> None:
    """Last, because compiling takes a minute each."""
    if has_field("train.compile"):
        here.option("compiled layers", "train.compile=layers")
        here.option("DeepCompile", "train.compile=deepcompile")


def run(probe: Probe) -> None:
    """The most valuable of every size first."""
    sizes = [Measured(probe, size) for size in ((TOY,) if probe.dry else SIZES)]
    for part in (trainer_and_bare, sharded, kernels, peers, compiled):
        for here in sizes:
            part(here)


if __name__ == "__main__":
    run_section("llm", run)
