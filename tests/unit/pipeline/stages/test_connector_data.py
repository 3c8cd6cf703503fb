"""What the data of the connector stage ask of its LLM is told before the first step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import LlmConfig
from pipeline.errors import RecipeError
from pipeline.models.language import load_language
from pipeline.models.processing import LlavaSltProcessor, ProcessorOptions
from pipeline.stages.connector_packing import answer_tokens
from pipeline.stages.connector_positions import check_answers
from pipeline.stages.data import Plans
from shards.format.text_columns import write_column
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from tests.unit.pipeline.models.test_pretrained import gpt2
from tests.unit.shards.shard_sets import in_memory


def test_the_longest_training_answer_fits_the_table_of_positions(tmp_path: Path) -> None:
    llm, tokenizer = load_language(LlmConfig(path=str(gpt2(tmp_path, positions=24))), torch.float32)
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt="signs: {video} sentence:"))
    options = PlanOptions(seed=0, kind="clip", max_frames=16)

    def plan(text: str, frames: int = 8, name: str = "videos") -> Plan:
        return Plan([Source(in_memory("video", [100, frames], name, text=["rain", text]), "train")], options)

    room = 24 - len(processor.prompt_ids(8))
    text = "the north " * 20
    while len(processor.answer_ids(text)) > room:
        text = text[:-1]
    assert len(processor.answer_ids(text)) == room
    held_out = plan("a held-out text is no input of the model " * 9)
    check_answers(llm, processor, Plans(plan(text), [held_out]))
    said = (
        rf"videos/videos1: the prompt and the text of this training sample \({room} tokens with eos\): 25 positions,"
        r" but the model of model\.llm has a table of 24; take an LLM with more positions, lower data"
    )
    with pytest.raises(RecipeError, match=said):
        check_answers(llm, processor, Plans(plan(text, frames=9), []))
    computed = torch.nn.Linear(1, 1)  # has no table
    check_answers(computed, processor, Plans(plan(text * 9), []))


def test_further_texts_of_a_sample_are_answers_too(tmp_path: Path) -> None:
    llm, tokenizer = load_language(LlmConfig(path=str(gpt2(tmp_path, positions=24))), torch.float32)
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt="signs: {video} sentence:"))
    set_of_two = in_memory("video", [8, 8], "videos", text=["rain", "sun"])
    (tmp_path / "set").mkdir()
    shard_set = dataclasses.replace(set_of_two, dir=tmp_path / "set")
    write_column(shard_set, "paraphrase", [["the rain in the north"], []], {})
    write_column(shard_set, "long", [[], ["a long text " * 9]], {})
    options = PlanOptions(seed=0, kind="clip", max_frames=16)
    plan = Plan([Source(shard_set, columns=("paraphrase", "long"))], options)
    counts = answer_tokens(processor, plan.samples, ["paraphrase"]).tolist()
    assert counts == [len(processor.answer_ids(text)) for text in ("the rain in the north", "sun")]
    check_answers(llm, processor, Plans(plan, []), ["paraphrase"])
    tokens = len(processor.answer_ids("a long text " * 9))
    with pytest.raises(
        RecipeError, match=rf"videos/videos1: the prompt and the text of .* \({tokens} tokens with eos\)"
    ):
        check_answers(llm, processor, Plans(plan, []), ["long"])
