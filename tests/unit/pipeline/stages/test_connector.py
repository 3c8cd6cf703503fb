"""The connector stage: items filled to the token, a loss of packed rows, generation in between, plain exports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.schema import Recipe
from pipeline.errors import DataError
from pipeline.models.attention import implementation
from pipeline.models.registry import build_llava_slt
from pipeline.stages import connector
from pipeline.stages.base import Normaliser
from pipeline.stages.batches import TranslationCollate
from pipeline.stages.connector import ConnectorStage
from pipeline.stages.data import Plans, StageContext
from shards.format.index import ShardSet
from shards.format.text_columns import write_column
from shards.order.plan import Plan
from tests.unit.pipeline.models.tiny import PIXELS, bpe_tokenizer, model_config, shake
from tests.unit.shards.shard_sets import in_memory

PROMPT = "signs: {video} sentence:"
TEXTS = ["Hello", "tomorrow it rains", " it  rains ", "I am here in the north", "</s> is a word", "here"]
FRAMES = [9, 61, 3, 64, 8, 17]


def recipe_of(tokenizer: Path, **data: Any) -> Recipe:
    model = model_config(tokenizer)
    return Recipe.model_validate(
        {
            "name": "x", "stage": "connector", "run_dir": "x", "model": model.model_dump(),
            "data": {
                "train": [{"shards": "train"}], "eval": [{"shards": "dev"}], "max_frames": 64, "image_pixels": PIXELS,
                **data,
            },
            "connector": {"prompt": PROMPT, "max_new_tokens": 3},
            "train": {"global_batch": 2, "micro_batch": 1, "precision": "fp32", "optimizer": {"lr": 1e-3}},
        }
    )  # fmt: skip


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> ShardSet:
    """The shard set of every source of a recipe: clips without bytes."""
    shard_set = in_memory("video", FRAMES, text=TEXTS)
    monkeypatch.setattr("pipeline.stages.data.open_set", lambda data, location, columns: shard_set)
    monkeypatch.setattr(connector, "open_set", lambda data, location: shard_set)
    return shard_set


@pytest.fixture
def stage(tmp_path: Path, shards: ShardSet) -> ConnectorStage:
    bpe_tokenizer(tmp_path)
    context = StageContext(recipe_of(tmp_path), 0, 1, torch.device("cpu"))
    stage = ConnectorStage.build(context, ConnectorStage.plans(context.recipe))
    shake(stage.module)
    return stage


def clips_of(plan: Plan, item: Any) -> list[tuple[np.ndarray, Any]]:
    """Clips of the frames that an item's samples deliver."""
    generator = np.random.default_rng(int(item["sample"][0]))
    return [
        (generator.integers(0, 256, (FRAMES[sample], PIXELS, PIXELS, 3), np.uint8), plan.samples.row(sample))
        for sample in item["sample"].tolist()
    ]


@pytest.mark.parametrize("tokens", ["word", "frame"])
def test_items_are_as_long_in_the_plan_as_in_the_row(tokens: str, tmp_path: Path, shards: ShardSet) -> None:
    """Whatever a tokenizer does at the border of prompt and text: lengths are those of the collator to the token."""
    bpe_tokenizer(tmp_path)
    recipe = recipe_of(tmp_path, pack_tokens=120)
    recipe = recipe.model_copy(update={"model": model_config(tmp_path, connector={"tokens": tokens})})
    plan = ConnectorStage.plan(recipe, recipe.data.train, train=True)
    model, processor = build_llava_slt(recipe.model, recipe.data, PROMPT, torch.float32)
    collate = TranslationCollate(processor, model.config.visual_config.clip_sizes())
    seen = []
    for item in plan.epoch(0):
        row = collate([clips_of(plan, item)])
        assert row["answers"]["packed"]["documents"].borders.diff().tolist() == item["length"].tolist()
        assert row["input_ids"].shape == (1, item["length"].sum()) and item["length"].sum() <= 120
        seen += item["sample"].tolist()
    assert sorted(seen) == list(range(len(TEXTS))) and len(plan.epoch(0)) < len(TEXTS)
    held_out = ConnectorStage.plan(recipe, recipe.data.eval, train=False)
    assert held_out.options.kind == "clip", "prompts are generated from one by one"


def test_a_sample_longer_than_an_item_is_named_with_the_fix(tmp_path: Path, shards: ShardSet) -> None:
    bpe_tokenizer(tmp_path)
    recipe = recipe_of(tmp_path, pack_tokens=20)
    said = r"samples are longer than block_tokens=20; the longest has \d+ tokens"
    with pytest.raises(DataError, match=said) as error:
        ConnectorStage.plan(recipe, recipe.data.train, train=True)
    assert "set3 (set/set3)" in str(error.value) and "raise block_tokens (data.pack_tokens" in str(error.value)


def test_the_loss_of_a_row_is_the_sum_over_its_samples(stage: ConnectorStage) -> None:
    plan = ConnectorStage.plan(stage.recipe, stage.recipe.data.train, train=True)
    clips = [clips_of(plan, item) for item in plan.epoch(0)]
    batches = [stage.collate()(clips[:3]), stage.collate()(clips[3:])]
    normaliser = Normaliser(sum(batch["valid_tokens"] for batch in batches), world_size=1)
    assert normaliser.valid_tokens == sum(len(stage.processor.answer_ids(text)) for text in TEXTS)
    with torch.no_grad():
        parts = [stage.loss(stage.module, batch, normaliser) for batch in batches]
        alone = [stage.loss(stage.module, stage.collate()([clip]), normaliser) for clip in clips]
    loss = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(loss, torch.stack([part.loss for part in alone]).sum())
    reduced = stage.reduce({name: float(sum(part.sums[name] for part in parts)) for name in parts[0].sums})
    assert reduced == pytest.approx({"loss": float(loss), "tokens": normaliser.valid_tokens}, rel=1e-5)


def test_an_evaluation_that_fails_leaves_the_training_attention(
    stage: ConnectorStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, key = stage.module.llm, implementation("sdpa")
    assert llm.config._attn_implementation == key and stage.attention_key == "sdpa"
    collate = connector.CollatePrompts(stage.processor, stage.module.config.visual_config.clip_sizes())
    seen = []

    def held_out(*args: Any) -> Iterator[Any]:
        yield collate([clips_of(plan, item) for item in plan.epoch(0)]), list(range(len(TEXTS)))
        seen.append(llm.config._attn_implementation)
        raise ZeroDivisionError

    plan = ConnectorStage.plan(stage.recipe, stage.recipe.data.train, train=True)
    monkeypatch.setattr(stage, "held_out", held_out)
    with pytest.raises(ZeroDivisionError):
        stage.evaluate(stage.module, lambda: False)
    assert seen == ["sdpa"] and llm.config._attn_implementation == key


def test_an_export_records_nothing_packed(stage: ConnectorStage, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    stage.attention_key = "none that exists"  # what opens an export computes with sdpa, whatever training uses
    probe = stage.probe(stage.module.eval())
    stage.write_export_files(folder)
    assert not any("slt_varlen" in path.read_text() for path in folder.glob("*.json"))
    stage.module.save_pretrained(folder)
    outputs = ConnectorStage.exported(folder, probe, torch.float32)
    torch.testing.assert_close(outputs["logits"], probe["logits"])


def test_plans_of_recipes_that_pack_nothing_are_as_ever(tmp_path: Path, shards: ShardSet) -> None:
    bpe_tokenizer(tmp_path)
    for data, kind in (({}, "clip"), ({"frame_budget": 128, "length_window": 4}, "group")):
        plans: Plans = ConnectorStage.plans(recipe_of(tmp_path, **data))
        assert plans.train.options.kind == kind and plans.train.options.block_tokens == 0


def test_columns_of_further_texts_are_read_where_they_count(
    tmp_path: Path, stage: ConnectorStage, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, references={"train": ["paraphrase"], "scored": ["reference"]})
    assert ConnectorStage.text_columns(recipe, train=True) == ("paraphrase",)
    assert ConnectorStage.text_columns(recipe, train=False) == ("reference",)
    sources = stage.recipe.data.eval
    assert stage.held_out_references(sources)(0, "Hello") == ["Hello"]
    (tmp_path / "set").mkdir()
    there = dataclasses.replace(shards, dir=tmp_path / "set")
    write_column(there, "reference", [["Hi", "Hello"], *([] for _ in TEXTS[1:])], {})
    monkeypatch.setattr("pipeline.stages.data.open_set", lambda data, location, columns: there)
    monkeypatch.setattr(stage, "recipe", recipe)
    references = stage.held_out_references(sources)
    assert references(0, "Hello") == ["Hello", "Hi"] and references(1, TEXTS[1]) == [TEXTS[1]]
