"""How clips, prompts and texts fill items of equal size for the connector stage (`data.pack_tokens`)."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.config.schema import Recipe
from pipeline.inference.cues import CueReader, example_pool
from pipeline.inference.references import most_of_texts
from pipeline.models.language import load_tokenizer
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.prompt import empty_texts
from pipeline.models.registry import build_processor, word_stride
from shards.order.options import PlanOptions
from shards.order.plan import CountTokens
from shards.order.samples import Samples
from shards.order.shuffle import Ints
from shards.text import tokenizer_fingerprint


def sequence_options(options: PlanOptions, recipe: Recipe) -> PlanOptions:
    """The options of a video plan, for items of at most `data.pack_tokens` tokens of the language model."""
    processor = _processor(recipe)
    counted_by = tokenizer_fingerprint(processor.tokenizer)
    if processor.cues:  # what they show is counted with the texts of the samples
        stated = json.dumps([recipe.connector.prompt, recipe.connector.prompts.model_dump()], sort_keys=True)
        counted_by = hashlib.sha256(f"{counted_by} {stated}".encode()).hexdigest()
    return replace(
        options,
        kind="sequence",
        block_tokens=recipe.data.pack_tokens,
        frames_per_token=1 if recipe.model.connector.tokens == "frame" else processor.options.stride,
        prompt_tokens=0 if processor.cues else len(processor.before_ids) + len(processor.after_ids),
        tokenizer=counted_by,
    )


def count_answers(recipe: Recipe) -> CountTokens:
    """``count(samples)``: tokens of each one's text as an answer, eos included, exactly as the collator makes them; of
    several texts the longest one's. Where the prompt shows cues, with those of its prompt around the video, as many as
    it can have.

    The count that an index may hold is that of the text alone, whose first word a tokenizer can cut otherwise than
    behind the space that follows the prompt.
    """
    processor = _processor(recipe)

    def count(samples: Samples) -> Ints:
        answers = answer_tokens(processor, samples, recipe.data.references.train)
        return answers + most_prompt_tokens(processor, samples, recipe.seed) if processor.cues else answers

    return count


def most_prompt_tokens(processor: LlavaSltProcessor, samples: Samples, seed: int) -> Ints:
    """[n_samples] tokens of each sample's prompt around the video, at most: whichever cues are left out, and whichever
    examples are drawn."""
    if not processor.cues:
        return np.full(len(samples), len(processor.before_ids) + len(processor.after_ids), dtype=np.int64)
    prompt, prompts = processor.options.prompt, processor.options.prompts
    pool = example_pool(samples, prompt, prompts, seed)
    longest = sorted(pool, key=lambda example: len(processor.answer_ids(example[0])), reverse=True)
    processor = processor.with_examples(longest)
    reader, empty = CueReader(processor.options), empty_texts(prompt, prompts)
    dropout = {name: getattr(prompts, name).dropout for name in ("previous", "gloss", "example")}

    def most(sample: int) -> int:
        cues = reader.whole(samples, sample, samples.row(sample), train=True)
        choices = [(cues[n], empty[n]) if dropout.get(n) else (cues[n],) for n in processor.cues]
        prompts = (dict(zip(processor.cues, chosen, strict=True)) for chosen in itertools.product(*choices))
        return max(sum(map(len, processor.around_video(each))) for each in prompts)

    return np.fromiter(map(most, range(len(samples))), dtype=np.int64, count=len(samples))


def answer_tokens(processor: LlavaSltProcessor, samples: Samples, references: Sequence[str]) -> Ints:
    """[n_samples] tokens of the longest answer that a sample is trained with, its end included.

    ``references``: text columns with further answers.
    """
    return most_of_texts(samples, references, lambda text: len(processor.answer_ids(text)))


def _processor(recipe: Recipe) -> LlavaSltProcessor:
    """The processor of the stage, without its models."""
    model = recipe.model
    assert model.llm is not None and model.visual is not None  # checked when the recipe was loaded
    stride = word_stride(model.visual)
    prompt, prompts = recipe.connector.prompt, recipe.connector.prompts
    return build_processor(load_tokenizer(model.llm), prompt, stride, model, recipe.data, prompts)
