"""Tiny models and tokenizers for the model tests, built in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.config.schema import (
    BackboneConfig,
    DataConfig,
    LlmConfig,
    ModelConfig,
    SentenceLevelConfig,
    SourceConfig,
    TinyLlm,
    TinyVit,
    VisualConfig,
    WordLevelConfig,
)

PIXELS = 32
CORPUS = ["signs: HELLO YOU sentence: I am here", "signs: RAIN TOMORROW NORTH sentence: tomorrow it rains in the north"]


def bpe_tokenizer(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (the GPT-2 / Llama 3 / SmolLM kind) saved to ``folder``."""
    tokens = special or {"bos_token": "<s>", "eos_token": "</s>"}
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=sorted(set(tokens.values())), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(CORPUS * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


def llm_config(tokenizer: Path) -> LlmConfig:
    sizes = TinyLlm(width=32, layers=2, heads=2, feed_forward=48, max_positions=128)
    return LlmConfig(tiny=sizes, tokenizer=str(tokenizer))


def visual_config(**changes: Any) -> VisualConfig:
    fields = {
        "backbone": BackboneConfig(tiny=TinyVit(width=24, layers=1, heads=2, feed_forward=32)),
        "width": 32,
        "max_frames": 64,
        "word": WordLevelConfig(layers=3, window_frames=4, stride=4, heads=2),
        "sentence": SentenceLevelConfig(layers=1, heads=2),
    }
    return VisualConfig(**{**fields, **changes})


def model_config(tokenizer: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(**{"llm": llm_config(tokenizer), "visual": visual_config(), **changes})


def data_config(**changes: Any) -> DataConfig:
    return DataConfig(train=[SourceConfig(shards="none")], **{"image_pixels": PIXELS, "max_frames": 64, **changes})


def clips(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random frames packed over clips of these lengths, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    frames_NHWC = torch.randint(0, 256, (sum(lengths), PIXELS, PIXELS, 3), dtype=torch.uint8, generator=generator)
    return frames_NHWC, torch.tensor(lengths)


def shake(module: torch.nn.Module, std: float = 0.05, seed: int = 1) -> None:
    """Moves every weight off its initial value, so that zero biases and unit norms hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
