"""Translation of batches with a LlavaSlt model: beam search or greedy, the same number of model calls on every rank.

Legend: B samples, L prompt positions, N packed frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.config.schema import ConnectorStageConfig
from pipeline.errors import RecipeError
from pipeline.inference.clips import PromptBatch, VideoPrompts
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.pretrained import check_positions
from pipeline.models.processing import LlavaSltProcessor


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How texts are generated. Nothing is taken from the LLM's own generation config."""

    num_beams: int = ConnectorStageConfig().num_beams
    """1 is greedy; published SLT systems use 4 to 8."""
    max_new_tokens: int = ConnectorStageConfig().max_new_tokens
    length_penalty: float = 1.0
    """Beam scores are divided by length to this power; above 1 favours longer texts."""
    synced: bool = False
    """All ranks generate together until the last one is done: needed when weights are partitioned (ZeRO-3)."""

    def __post_init__(self) -> None:
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise RecipeError(
                f"generation: num_beams {self.num_beams} and max_new_tokens {self.max_new_tokens} must be at least 1."
            )

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    def config(self, eos_id: int | list[int], pad_id: int) -> GenerationConfig:
        """The complete configuration: pretrained chat models bring their own sampling and repetition penalties, which
        would change scores silently, so each of these is set."""
        beams: dict[str, Any] = {"length_penalty": self.length_penalty} if self.num_beams > 1 else {}
        return GenerationConfig(
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            use_cache=True,
            **beams,
        )


def check_fits(
    model: LlavaSltForConditionalGeneration, processor: LlavaSltProcessor, options: GenerationOptions, part: str
) -> None:
    """The longest prompt and translation together must fit the LLM; ``part`` names the model in the message.

    Raises:
        RecipeError: its table of positions is shorter.
    """
    frames, new = processor.options.max_frames, options.max_new_tokens
    prompt = len(processor.prompt_ids(frames))
    check_positions(
        model.llm, prompt + new, f"--set max_new_tokens={new} behind a prompt of {prompt} tokens (at {frames} frames)",
        part, "lower max_new_tokens",
    )  # fmt: skip


@torch.no_grad()
def translate_batch(
    model: LlavaSltForConditionalGeneration,
    processor: LlavaSltProcessor,
    batch: VideoPrompts,
    options: GenerationOptions,
) -> list[str]:
    """Texts of one batch, in its order.

    Args:
        model: in eval mode, on the device to use.
        processor: the one that made the batch.
        batch: on any device; it is moved to the model's.
        options: search options.
    """
    here, ends = model.device, end_ids(model, processor)
    new_ids_BL = model.generate(
        input_ids=batch["input_ids"].to(here, non_blocking=True),
        attention_mask=batch["attention_mask"].to(here, non_blocking=True),
        frames=batch["frames_NHWC"].to(here, non_blocking=True),
        layout=batch["layout"].to(here),
        generation_config=options.config(ends if len(ends) > 1 else ends[0], processor.pad_id),
        synced_gpus=options.synced,
    )
    return processor.decode(new_ids_BL, ends)


def end_ids(model: LlavaSltForConditionalGeneration, processor: LlavaSltProcessor) -> list[int]:
    """Every id that ends an answer: the tokenizer's eos, and the LLM's other end ids as `set_end_ids` found them, which
    an export keeps in its generation config."""
    ends = with_end(getattr(model.generation_config, "eos_token_id", None), processor.end_id)
    return list(dict.fromkeys([processor.eos_id, *(ends if isinstance(ends, list) else [ends])]))


def with_end(stated: int | list[int] | None, end_id: int) -> int | list[int]:
    """The end ids of a generation config, and the one that ends an answer; as before where it is among them."""
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if end_id in ends:
        assert stated is not None
        return stated
    return [*ends, end_id] if ends else end_id


@dataclass(frozen=True, slots=True)
class Prediction:
    """One translated sample."""

    corpus: str
    sample_id: str
    split: str
    signer: str
    reference: str
    hypothesis: str

    @property
    def key(self) -> str:
        """Unique over corpora: ``<corpus>/<sample_id>``."""
        return f"{self.corpus}/{self.sample_id}"


def translate(
    model: LlavaSltForConditionalGeneration,
    processor: LlavaSltProcessor,
    batches: Iterable[tuple[PromptBatch, Sequence[int]]],
    options: GenerationOptions,
    on_batch: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Translate this rank's batches.

    Args:
        model: put into eval mode while this runs.
        processor: the one that made the batches.
        batches: pairs of a batch and its samples, as `shards.load.loader.EvalLoader.padded` gives them. A batch
            without samples only keeps ranks in step and gives no prediction.
        options: search options.
        on_batch: called after each batch with the number of samples done.
    """
    predictions: list[Prediction] = []
    was_training = model.training
    model.eval()
    try:
        for batch, samples in batches:
            texts = translate_batch(model, processor, batch, options)
            for row, text in list(zip(batch["rows"], texts, strict=True))[: len(samples)]:
                predictions.append(Prediction(row.corpus, row.sample_id, row.split, row.signer, row.text, text))
            if on_batch is not None:
                on_batch(len(samples))
    finally:
        model.train(was_training)
    return predictions
