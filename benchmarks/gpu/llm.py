"""Section d: stage 1 of Llama-shaped models with random weights, packs of 4,096 tokens, bf16: tokens per second, MFU
and peak memory of our trainer, and of a bare DeepSpeed loop over the same batches."""

from __future__ import annotations

import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import Probe, run_section
from benchmarks.gpu.training import fit, make_training, peak_gib, reset_memory, resolved_recipe, run_sets, synchronise

VOCABULARY = 32000


@dataclass(frozen=True)
class Size:
    """A model, and what one step of it holds."""

    name: str
    model: str
    zeros: tuple[int, ...]
    """ZeRO stages measured, the first one beside the bare loop."""
    block_tokens: int = 4096
    global_batch: int = 8
    micro_batch: int = 2
    steps: int = 10
    vocabulary: int = VOCABULARY


SIZES = (
    Size("0.5B", "{width: 1280, layers: 24, heads: 20, feed_forward: 3456, max_positions: 4096}", (1, 3)),
    Size("1.3B", "{width: 2048, layers: 24, heads: 16, feed_forward: 5504, max_positions: 4096}", (1,)),
)
TOY = Size("toy", "{width: 32, layers: 1, heads: 2, feed_forward: 64, max_positions: 128}", (1,), 128, 4, 2, 3, 200)


def tokenizer_folder(probe: Probe, vocabulary: int) -> Path:
    """A tokenizer of made-up words: the head's share of the work needs a vocabulary of real size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = probe.work / f"words-{vocabulary}"
    if not folder.is_dir():
        words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{number}" for number in range(vocabulary - 4))]
        made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


def text_shards(probe: Probe, size: Size) -> Path:
    """Documents of random words, 8 to 800 long, enough for every step."""
    from shards.build.build import BuildOptions, build
    from shards.corpora.text import Text

    tokens = size.block_tokens * size.global_batch * (size.steps + 2)
    folder = probe.work / f"text-{size.vocabulary}-{tokens}"
    if not folder.is_dir():
        draw, left, rows = random.Random(0), tokens, []
        while left > 0:
            length = min(int(8 * 100 ** draw.random()), size.block_tokens // 2)
            rows.append(" ".join(f"w{draw.randrange(size.vocabulary - 4)}" for _ in range(length)))
            left -= length
        source = probe.work / f"{folder.name}.jsonl"
        source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
        corpus = Text(paths={"train": str(source)}, templates=["{text}"], language="en")
        build(corpus, folder, BuildOptions(tokenizer=str(tokenizer_folder(probe, size.vocabulary))), 1)
    return folder


def sets(probe: Probe, size: Size, zero: int) -> list[str]:
    tokenizer, shards = tokenizer_folder(probe, size.vocabulary), text_shards(probe, size)
    return [
        *run_sets(probe, probe.work / "runs" / f"llm-{size.name}-zero{zero}", zero, size.steps),
        f"model.llm={{tiny: {size.model}, tokenizer: {tokenizer}}}", f"data.train=[{{shards: {shards}}}]",
        f"data.block_tokens={size.block_tokens}", f"train.global_batch={size.global_batch}",
        f"train.micro_batch={size.micro_batch}", "data.workers=0", "train.peak_tflops=" + ("1" if probe.dry else "989"),
    ]  # fmt: skip


def ours(probe: Probe, size: Size, zero: int) -> dict[str, float]:
    """Our trainer with its loader, metrics and agreement between ranks."""
    from pipeline.engine.metrics import read_metrics

    reset_memory(probe)
    training = make_training("demo_continued_pretraining", sets(probe, size, zero), probe)
    fit(training)
    peak = peak_gib(probe)
    rows = [row for row in read_metrics(training.run_dir) if "perf/mfu" in row][size.steps // 3 :]
    found = {"tokens_per_second": statistics.median(row["perf/tokens_per_second"] for row in rows)}
    found |= {"mfu": statistics.median(row["perf/mfu"] for row in rows), "peak_gib": peak}
    seconds = sorted(row["perf/seconds_per_step"] for row in rows)
    return found | {"seconds_per_step": statistics.median(seconds), "slowest_step_seconds": seconds[-1]}


def bare(probe: Probe, size: Size, zero: int) -> dict[str, Any]:
    """The same model, loss and configuration in the shortest DeepSpeed loop, batches in memory on the device."""
    import deepspeed

    from pipeline.engine.setup import parameter_groups, quiet_deepspeed
    from pipeline.stages.base import Normaliser
    from pipeline.stages.batches import to_device
    from pipeline.stages.continued_pretraining import ContinuedPretraining
    from pipeline.stages.data import StageContext
    from shards.load.loader import StepLoader
    from shards.load.requests import LoaderOptions

    reset_memory(probe)
    resolved = resolved_recipe("demo_continued_pretraining", sets(probe, size, zero))
    plans = ContinuedPretraining.plans(resolved.recipe)
    context = StageContext(resolved.recipe, rank=0, world_size=1, device=torch.device(probe.device, 0))
    with torch.device(probe.device):  # random weights are drawn far faster there
        stage = ContinuedPretraining.build(context, plans)
    model, config = stage.module, resolved.ds_config
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3)
    with quiet_deepspeed():
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    options = LoaderOptions(0, 1, size.global_batch, size.micro_batch)
    loader = StepLoader(plans.train, stage.fetch(), stage.collate(), options)
    steps = [batch.micro_batches for _, batch in zip(range(size.steps), loader, strict=False)]
    flops = stage.flops_per_step([micro for micros in steps for micro in micros]) / size.steps
    valid = [sum(micro["valid_tokens"] for micro in micros) for micros in steps]
    steps = [[to_device(micro, stage.device) for micro in micros] for micros in steps]
    seconds = []
    for micros, tokens in zip(steps, valid, strict=True):
        synchronise(probe)
        start = time.perf_counter()
        for micro in micros:
            engine.backward(stage.loss(engine, micro, _normaliser(Normaliser, tokens)).loss, scale_wrt_gas=False)
            engine.step()
        synchronise(probe)
        seconds.append(time.perf_counter() - start)
    engine.destroy()
    typical = statistics.median(seconds[size.steps // 3 :])
    peak_flops = resolved.recipe.train.peak_tflops * 1e12
    found = {"tokens_per_second": statistics.median(valid) / typical, "mfu": flops / typical / peak_flops}
    return found | {"peak_gib": peak_gib(probe), "seconds_per_step": typical}


def _normaliser(kind: Any, tokens: int) -> Any:
    fields = {"valid_tokens": tokens, "world_size": 1, "accumulation_steps": 1}
    return kind(**{name: fields[name] for name in kind.__dataclass_fields__})


def report(probe: Probe, title: str, found: dict[str, Any]) -> None:
    shown = f"{found['tokens_per_second']:,.0f} tokens/s, MFU {100 * found['mfu']:.1f} %, peak {found['peak_gib']} GiB"
    probe.add(title, True, shown, **found)


def measure(probe: Probe, size: Size) -> None:
    trained = {}
    for zero in size.zeros:
        trained[zero] = ours(probe, size, zero)
        report(probe, f"{size.name} zero{zero}, our trainer", trained[zero])
    found = bare(probe, size, size.zeros[0])
    report(probe, f"{size.name} zero{size.zeros[0]}, bare loop", found)
    ratio = found["seconds_per_step"] / trained[size.zeros[0]]["seconds_per_step"]
    probe.add(f"{size.name} our speed of the bare loop's", True, round(ratio, 3), "x")


def run(probe: Probe) -> None:
    for size in (TOY,) if probe.dry else SIZES:
        try:
            measure(probe, size)
        except torch.cuda.OutOfMemoryError as error:  # news, and the other size may still fit
            probe.add(f"{size.name} memory", False, "out of memory", text=str(error)[:500])
        reset_memory(probe)


if __name__ == "__main__":
    run_section("llm", run)
