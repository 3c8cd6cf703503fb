"""How clips, prompts and texts fill items of equal size for the connector stage (`data.pack_tokens`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.config.schema import Recipe
from pipeline.models.language import load_tokenizer
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.registry import build_processor, word_stride
from shards.order.options import PlanOptions
from shards.order.plan import CountTokens
from shards.order.samples import Samples
from shards.order.shuffle import Ints
from shards.text import tokenizer_fingerprint


def sequence_options(options: PlanOptions, recipe: Recipe) -> PlanOptions:
    """The options of a video plan, for items of at most `data.pack_tokens` tokens of the language model."""
    processor = _processor(recipe)
    return replace(
        options,
        kind="sequence",
        block_tokens=recipe.data.pack_tokens,
        frames_per_token=1 if recipe.model.connector.tokens == "frame" else processor.options.stride,
        prompt_tokens=len(processor.before_ids) + len(processor.after_ids),
        tokenizer=tokenizer_fingerprint(processor.tokenizer),
    )


def count_answers(recipe: Recipe) -> CountTokens:
    """``count(samples)``: tokens of each one's text as an answer, eos included, exactly as the collator makes them.

    The count that an index may hold is that of the text alone, whose first word a tokenizer can cut otherwise than
    behind the space that follows the prompt.
    """
    processor = _processor(recipe)

    def count(samples: Samples) -> Ints:
        texts = samples.column("text").to_pylist()
        of_text = {text: len(processor.answer_ids(text)) for text in dict.fromkeys(texts)}
        return np.fromiter(map(of_text.__getitem__, texts), dtype=np.int64, count=len(texts))

    return count


def _processor(recipe: Recipe) -> LlavaSltProcessor:
    """The processor of the stage, without its models."""
    model = recipe.model
    assert model.llm is not None and model.visual is not None  # checked when the recipe was loaded
    stride = word_stride(model.visual)
    return build_processor(load_tokenizer(model.llm), recipe.connector.prompt, stride, model, recipe.data)
