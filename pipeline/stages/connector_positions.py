"""Checks before the first step that the connector stage's inputs fit the LLM's table of positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config.schema import Recipe
from pipeline.models.pretrained import check_positions, position_limit
from pipeline.models.processing import LlavaSltProcessor
from pipeline.stages.connector_packing import answer_tokens, most_prompt_tokens
from pipeline.stages.data import Plans


def check_prompt(llm: Any, processor: LlavaSltProcessor, recipe: Recipe) -> None:
    """Prompt, word tokens of the longest clip and generated answer must fit the LLM. Raises RecipeError."""
    data, config = recipe.data, recipe.connector
    prompt = len(processor.prompt_ids(data.max_frames))
    check_positions(
        llm, prompt + config.max_new_tokens,
        f"connector.prompt with data.max_frames={data.max_frames} ({prompt} tokens) and"
        f" connector.max_new_tokens={config.max_new_tokens}", "model.llm",
        "lower data.max_frames or connector.max_new_tokens",
    )  # fmt: skip


def check_answers(llm: Any, processor: LlavaSltProcessor, plans: Plans, references: Sequence[str] = ()) -> None:
    """Training answers are not cut: each must fit the LLM's table of positions, if it has one, after the prompt of its
    clip, and so must those of the text columns ``references``. Raises RecipeError naming the longest."""
    if position_limit(llm) is None:
        return
    samples, options = plans.train.samples, plans.train.options
    kept = options.most_frames(samples.column("frames").to_numpy())
    prompts = most_prompt_tokens(processor, samples, options.seed)
    answers = answer_tokens(processor, samples, references)
    lengths = [
        processor.visual_tokens(int(frames)) + int(prompt) + int(answer)
        for frames, prompt, answer in zip(kept, prompts, answers, strict=True)
    ]
    longest = lengths.index(max(lengths))
    row = samples.row(longest)
    check_positions(
        llm, lengths[longest],
        f"{row.corpus}/{row.sample_id}: the prompt and the text of this training sample"
        f" ({int(answers[longest])} tokens with eos)", "model.llm",
        "take an LLM with more positions, lower data.max_frames, or build the shards without such long texts",
    )  # fmt: skip
