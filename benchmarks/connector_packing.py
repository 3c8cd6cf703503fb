"""Stage 3 on packed rows against the padded rows it had before, on the lengths of PHOENIX-2014T.

    python benchmarks/connector_packing.py [--quick] [--out FILE] [--data FOLDER]

Clip lengths and texts are those of PHOENIX-2014T train (SLT_SHARED_DATA), tokenised with a real tokenizer; frames are
random stored features. Both sides take the same samples in the same micro-batches through the same model, losses must
agree, and forward, backward and optimizer step are timed in turn. Batches are made beforehand on both sides. Padded
rows are also timed sorted by length, their best case, and the receipt says how full items of `data.pack_tokens` are.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from receipt import ROOT, Claim, write_receipt

from pipeline.config.schema import (
    BackboneConfig,
    ConnectorConfig,
    DataConfig,
    LlmConfig,
    ModelConfig,
    SourceConfig,
    TinyLlm,
    TinyVit,
    VisualConfig,
)
from pipeline.models.attention import implementation
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.generation_attention import switched
from pipeline.models.language import output_head
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.registry import build_llava_slt
from shards.order import packing
from shards.order.options import kept_frames

MAX_FRAMES, FRAME_STRIDE, PROMPT, MICRO_BATCH = 300, 2, "{video}\nDeutsch:", 16
"""Of the recipe for this corpus, but for the micro-batch, which is the demo's."""
PACK_TOKENS = 1024
TARGET = 1.5


@dataclass(frozen=True)
class Sample:
    """A clip by its kept frames, and its text."""

    frames: int
    text: str


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for both sides."""

    features_NP: torch.Tensor
    layout: ClipLayout
    packed: dict[str, Any]
    padded: dict[str, torch.Tensor]
    targets_BL: torch.Tensor
    """Of the padded rows: the token that each place predicts, -100 outside answers."""
    tokens: int
    """Real tokens of all samples, prompts and visual tokens included."""


def samples(data: Path, count: int) -> list[Sample]:
    """The first ``count`` of PHOENIX-2014T train in a seeded order."""
    folder = data / "phoenix2014t"
    lines = (folder / "num_frames.train.tsv").read_text(encoding="utf-8").splitlines()
    frames = dict(line.split("\t") for line in lines)
    with (folder / "PHOENIX-2014-T.train.corpus.csv").open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="|", quoting=csv.QUOTE_NONE))
    found = [
        Sample(int(kept_frames(int(frames[row["name"]]), MAX_FRAMES, FRAME_STRIDE)), row["translation"]) for row in rows
    ]
    return [found[number] for number in np.random.default_rng(0).permutation(len(found))[:count]]


def build(data: Path, quick: bool) -> tuple[LlavaSltForConditionalGeneration, LlavaSltProcessor]:
    sizes = (
        TinyLlm(width=64, layers=2, heads=2, feed_forward=128)
        if quick
        else TinyLlm(width=384, layers=6, heads=6, feed_forward=768)
    )
    # GFSLT's, made for these texts: the head is as small beside the decoder as in a model of some billions
    tokenizer = str(data / "mbart_trimmed_spm")
    backbone = BackboneConfig(tiny=TinyVit(), train="frozen")
    recipe = ModelConfig(
        llm=LlmConfig(tiny=sizes, tokenizer=tokenizer),
        visual=VisualConfig(backbone=backbone, width=128),
        connector=ConnectorConfig(hidden=384),
    )
    torch.manual_seed(0)
    data_config = DataConfig(train=[SourceConfig(shards="none")], max_frames=MAX_FRAMES)
    model, processor = build_llava_slt(recipe, data_config, PROMPT, torch.float32, implementation("sdpa"))
    model.requires_grad_(False).connector.requires_grad_(True)
    return model.train(), processor


def collate(model: LlavaSltForConditionalGeneration, processor: LlavaSltProcessor, chosen: list[Sample]) -> Batch:
    lengths, texts = [sample.frames for sample in chosen], [sample.text for sample in chosen]
    width = model.visual.frame_projection.in_features
    generator = torch.Generator().manual_seed(sum(lengths))
    padded, packed = processor(lengths, texts), processor.pack(lengths, texts)
    ends_B = padded["attention_mask"].sum(1).tolist()
    targets_BL = torch.full_like(padded["input_ids"], -100)
    for targets_L, ids_L, end, text in zip(targets_BL, padded["input_ids"], ends_B, texts, strict=True):
        begin = end - len(processor.answer_ids(text))
        targets_L[begin - 1 : end - 1] = ids_L[begin:end]
    return Batch(
        torch.randn(sum(lengths), width, generator=generator),
        ClipLayout.of(lengths, model.config.visual_config.clip_sizes()),
        dict(packed), dict(padded), targets_BL, sum(ends_B),
    )  # fmt: skip


def packed_loss(model: LlavaSltForConditionalGeneration, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**batch.packed, frames=batch.features_NP, layout=batch.layout).loss_sum
    return loss


def padded_loss(model: LlavaSltForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """The stage's forward as it was: right padded rows, a mask, hidden states chosen by a mask."""
    embeds_BLE = model.embed_inputs(batch.padded["input_ids"], batch.features_NP, None, batch.layout)
    hidden_BLE = model.get_decoder()(
        inputs_embeds=embeds_BLE, attention_mask=batch.padded["attention_mask"], use_cache=False
    ).last_hidden_state
    scored_BL = batch.targets_BL != -100
    loss: torch.Tensor = model.token_loss(
        hidden_BLE[scored_BL], batch.targets_BL[scored_BL], head=output_head(model.llm)
    )
    return loss


Side = tuple[str, Callable[[LlavaSltForConditionalGeneration, Batch], torch.Tensor]]
PACKED: Side = (implementation("sdpa"), packed_loss)
PADDED: Side = ("sdpa", padded_loss)


def one_pass(model: LlavaSltForConditionalGeneration, side: Side, batches: list[Batch]) -> tuple[float, float]:
    """Seconds of a step on every batch, and the sum of the losses; the weights stay as they are."""
    key, loss_of = side
    optimizer = torch.optim.AdamW(model.connector.parameters(), lr=0.0, weight_decay=0.0)
    total, begin = 0.0, time.perf_counter()
    with switched(model.llm, key):
        for batch in batches:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss.detach())
    return time.perf_counter() - begin, total


def fill(processor: LlavaSltProcessor, chosen: list[Sample], batches: list[Batch]) -> dict[str, float]:
    """Shares of real tokens in padded rows and in items of `PACK_TOKENS`, and how unequal items are."""
    prompt = len(processor.before_ids) + len(processor.after_ids)
    sizes = [processor.visual_tokens(s.frames) + prompt + len(processor.answer_ids(s.text)) for s in chosen]
    items = packing.pack(np.arange(len(sizes)), np.asarray(sizes, dtype=np.int64), PACK_TOKENS)
    held = np.add.reduceat(items.elements["length"].astype(np.int64), items.starts[:-1])
    rows = [batch.tokens for batch in batches]
    return {
        "real_tokens_in_padded_rows": sum(rows) / sum(batch.targets_BL.numel() for batch in batches),
        f"filled_of_{PACK_TOKENS}": float(held.sum() / (len(items) * PACK_TOKENS)),
        "largest_over_mean_item_of_clips": max(rows) / statistics.mean(rows),
        f"largest_over_mean_item_of_{PACK_TOKENS}": float(held.max() / held.mean()),
    }


def measure(data: Path, quick: bool) -> list[Claim]:
    rounds, count = (2, 2 * MICRO_BATCH) if quick else (9, 8 * MICRO_BATCH)
    model, processor = build(data, quick)
    chosen = samples(data, count)

    def batches_of(order: list[Sample]) -> list[Batch]:
        return [collate(model, processor, order[at : at + MICRO_BATCH]) for at in range(0, count, MICRO_BATCH)]

    sides = {
        "packed": (PACKED, batches_of(chosen)),
        "padded": (PADDED, batches_of(chosen)),
        "padded, sorted by length": (PADDED, batches_of(sorted(chosen, key=lambda s: (s.frames, len(s.text))))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses = {}
    for number in range(-1, rounds):  # the first warms up
        for name, (side, batches) in sides.items():
            took, losses[name] = one_pass(model, side, batches)
            seconds[name] += [took] if number >= 0 else []
    assert abs(losses["packed"] / losses["padded"] - 1) < 1e-5, losses
    tokens = sum(batch.tokens for batch in sides["packed"][1])
    speed = {name: tokens / statistics.median(took) for name, took in seconds.items()}
    detail = {
        "seconds": seconds, "losses": losses, "tokens": tokens, "samples": count, "micro_batch": MICRO_BATCH,
        "llm": model.llm.config.to_diff_dict(), "threads": torch.get_num_threads(),
        **fill(processor, samples(data, 1 << 20), sides["padded"][1]),
    }  # fmt: skip
    return [
        Claim(
            claim=f"stage-3 step on packed rows against {name} rows, PHOENIX-2014T train",
            ours=speed["packed"],
            peer=speed[name],
            ratio=statistics.median(b / a for a, b in zip(seconds["packed"], seconds[name], strict=True)),
            target=target,
            unit="real tokens/s",
            runs=rounds,
            detail=detail,
        )
        for name, target in (("padded", TARGET), ("padded, sorted by length", 1.0))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, two rounds: shows that it runs, no more")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    default = Path(os.environ.get("SLT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of the shared corpora")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"no real lengths: {options.data} does not exist; set SLT_SHARED_DATA or --data")
    rows = measure(options.data, options.quick)
    write_receipt(rows, options.out, ("torch", "transformers"))
    return 0 if all(row.reached for row in rows) or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
