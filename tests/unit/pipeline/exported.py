"""A tiny exported translation model and a tiny video shard set, for tests of evaluation and serving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
from pipeline.models.registry import build_llava_slt
from shards.build.build import BuildOptions, build
from shards.media.video import VideoOptions
from shards.schema import FrameFolder, Segment

FORM = VideoOptions(short_side=32, fps=10.0)
PROMPT = "signs: {video} text:"
WORDS = ["signs", "text", ":", "X", "rain", "sun", "in", "the", "north", "south"]
TEXTS = [
    "rain in the north",
    "sun in the south",
    "rain in the south",
    "sun",
    "the rain",
    "north",
    "the sun in the north",
]


def save_export(folder: Path) -> Path:
    """Random weights, saved as an exported run is."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    model = ModelConfig(
        llm=LlmConfig(
            tiny=TinyLlm(width=16, layers=1, heads=2, feed_forward=32, max_positions=64),
            tokenizer=str(folder / "tokenizer"),
        ),
        visual=VisualConfig(
            backbone=BackboneConfig(tiny=TinyVit(width=12, layers=1, heads=2, feed_forward=16, patch_pixels=16)),
            width=16,
            max_frames=32,
        ),
        connector=ConnectorConfig(hidden=16),
    )
    data = DataConfig(train=[SourceConfig(shards="unused")], max_frames=10, frame_stride=2, image_pixels=32)
    llava, processor = build_llava_slt(model, data, PROMPT, torch.float32)
    with torch.no_grad():
        for parameter in llava.parameters():  # as initialised, every clip would get the same text
            if parameter.dim() > 1:
                parameter.normal_(std=0.7)
        head = llava.llm.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        head.weight[:3] = 0.0  # special tokens are seldom the best
    out = folder / "export"
    llava.save_pretrained(out)
    processor.save_pretrained(out)
    return out


class TinyCorpus:
    """Seven clips of moving squares, two corpora's worth of ids."""

    name = "tiny"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def segments(self) -> Iterator[Segment]:
        for number, text in enumerate(TEXTS):
            media = write_frames(self.folder / f"clip{number}", 6 + 3 * number, seed=number)
            yield Segment("tiny", f"clip/{number}", "test", text, media, signer=f"s{number % 2}")


def write_frames(folder: Path, frames: int, seed: int) -> FrameFolder:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(frames):
        image = np.full((32, 48, 3), 40 + 20 * seed, np.uint8)
        image[8:16, number % 40 : number % 40 + 8] = 250
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return FrameFolder(folder, "*.png", FORM.fps)


def save_shards(folder: Path) -> Path:
    build(TinyCorpus(folder / "media"), folder / "shards", BuildOptions(video=FORM, samples_per_shard=3))
    return folder / "shards"
