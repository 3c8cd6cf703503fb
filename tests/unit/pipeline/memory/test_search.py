"""Choosing a ZeRO stage and the nearest recipe that fits, on tiny models whose bytes can be reckoned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.load import load_recipe
from pipeline.config.parts_schema import PartConfig
from pipeline.config.rates import rates_of
from pipeline.config.schema import Recipe
from pipeline.config.stages import STAGES
from pipeline.engine.setup import parameter_groups
from pipeline.memory import plan as plans
from pipeline.memory.answer import answer
from pipeline.memory.lines import GIB, PHASES
from pipeline.memory.parts import UNKNOWN_GLOSSES, gloss_classes, parts_of
from pipeline.memory.search import _options, choose, plan_of
from pipeline.memory.zero import _groups
from pipeline.stages.registry import stage_class
from shards.format.index import write_index
from shards.schema import Manifest
from tests.unit.pipeline.config.recipes import CONNECTOR, CONTRASTIVE, PRETRAINING, write
from tests.unit.pipeline.models.tiny import bpe_tokenizer, llm_config
from tests.unit.shards.shard_sets import in_memory


def _recipe(folder: Path, stage: str, *sets: str) -> Recipe:
    """A recipe of each stage whose models are configs on disk."""
    from transformers import AutoConfig

    bpe_tokenizer(folder)
    if stage == "continued_pretraining":
        return load_recipe(write(folder, PRETRAINING), [f"model.llm.tokenizer={folder}", *sets])
    if stage == "contrastive":
        sizes = {"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        AutoConfig.for_model("bert", vocab_size=99, **sizes).save_pretrained(folder / "text")
        return load_recipe(write(folder, CONTRASTIVE), [f"model.text_encoder.path={folder / 'text'}", *sets])
    tiny = json.dumps(llm_config(folder).model_dump(mode="json"))
    backbone = {"backbone": {"tiny": {"width": 24, "layers": 1, "heads": 2, "feed_forward": 32}}, "width": 32}
    start = ["model.init_from.connector=models/stage3"] if stage == "sequence_tuning" else []
    sets = (f"model.llm={tiny}", f"model.visual={json.dumps(backbone)}", *sets)
    return load_recipe(write(folder, CONNECTOR), [f"stage={stage}", *start, *sets])


@pytest.fixture
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models against tiny GPUs."""
    monkeypatch.setattr(plans, "RESERVED_GIB", 0.0)


@pytest.mark.parametrize("stage", ["continued_pretraining", "contrastive", "connector", "sequence_tuning"])
def test_a_plan_of_every_stage(stage: str, tmp_path: Path) -> None:
    """Frozen and trained weights are those of the stage's own freeze plan."""
    recipe = _recipe(tmp_path, stage)
    parts = parts_of(recipe)
    kind: Any = stage_class(stage)
    planned = kind.freeze_plan(object.__new__(kind))
    for name, module in parts.modules.items():
        if name != "model":
            assert planned[name] == any(parameter.requires_grad for parameter in module.parameters()), name
        else:
            assert {part for part, _ in module.named_children()} <= set(planned) and all(planned.values())
    plan = plan_of(recipe, 2, parts)
    assert plan.phase in PHASES and plan.fits is None and plan.peak_bytes > 0
    items = {line.item for line in plan.lines}
    assert {"AdamW moments", "gradients", "reduction bucket"} <= items
    wanted = {
        "continued_pretraining": {"activations of the LLM", "logits of one chunk"},
        "contrastive": {"frame backbone", "text encoder", "similarities", "features of the global batch"},
        "connector": {"weights, frozen", "activations of the LLM", "cache of generation", "frame backbone"},
    }
    wanted["sequence_tuning"] = wanted["connector"]
    assert wanted[stage] <= items
    assert plan.largest(2)[0].bytes >= plan.largest(2)[1].bytes
    # a setting that the stage does not read would be proposed in vain
    unread = {field for line in plan.lines for field in line.fields if field.startswith(STAGES[stage].unread)}
    assert not unread
    offered = {name for name, _ in _options(recipe, 2)}
    assert not {name for name in offered if name.startswith(STAGES[stage].unread)}


def test_what_a_prompt_shows_of_each_sample_counts(tmp_path: Path) -> None:
    def peak(*sets: str) -> int:
        recipe = _recipe(tmp_path, "connector", "data.max_frames=16", *sets)
        return sum(line.bytes for line in plan_of(recipe, 1, parts_of(recipe)).lines)

    shows = "connector.prompt='{video} {previous}'", "connector.prompts.previous.empty=none"
    assert peak("connector.prompt='{video} previous'") < peak(*shows)
    assert peak(*shows) < peak(*shows, "connector.prompts.previous.count=3")


def test_a_gloss_head_counts_by_its_vocabulary(tmp_path: Path) -> None:
    """Of the training split; where no index can be read, by a large one."""
    recipe = _recipe(tmp_path, "contrastive", "contrastive.ctc.weight=1", "train.global_batch=8", "data.max_frames=16")
    assert gloss_classes(recipe) == 1 + UNKNOWN_GLOSSES
    (tmp_path / "shards").mkdir()
    write_index(tmp_path / "shards", in_memory("video", [8, 8], gloss=["A B", "C A"]).table, Manifest(kind="video"))
    sources = [recipe.data.train[0].model_copy(update={"shards": str(tmp_path / "shards")})]
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": sources})})
    assert gloss_classes(recipe) == 4
    (line,) = [line for line in plan_of(recipe, 1, parts_of(recipe)).lines if line.item == "gloss logits"]
    assert line.bytes == 2 * 4 * 8 * (16 // 4) * 4, "fp32, and their gradient: 8 clips of 4 word tokens, 4 classes"


def test_alignment_with_glosses_counts_frames(tmp_path: Path) -> None:
    def features(*sets: str) -> int:
        recipe = _recipe(tmp_path, "contrastive", "contrastive.objective=sentence", *sets)
        lines = plan_of(recipe, 1, parts_of(recipe)).lines
        return next(line.bytes for line in lines if line.item == "features of the global batch")

    clip = features() // 2
    rows = (features("contrastive.alignment.frame_weight=1") - features()) // clip
    assert rows == 256 + 64, "data.max_frames, and the longest glosses that are counted"


def test_parts_of_a_recipe_are_planned(tmp_path: Path) -> None:
    """Adapters, an open word level and a language model that trains: by the groups that the optimizer will have."""
    plain = plan_of(recipe := _recipe(tmp_path, "connector"), 2, parts_of(recipe))
    planned = {
        "visual.word": PartConfig(lr=1e-4, lr_decay=0.5), "llm": PartConfig(lr=1e-4),
        "llm.model.layers.0": PartConfig(mode="frozen"),
    }  # fmt: skip
    train = recipe.train.model_copy(update={"parts": planned})
    changed = recipe.model_copy(update={"train": train})
    parts = parts_of(changed)
    module = torch.nn.ModuleDict(parts.modules)
    rates = rates_of([name for name, _ in module.named_parameters()], planned, train.optimizer.lr)
    groups = parameter_groups(module, 0.1, rates)
    assert _groups(list(parts.weights())) == [[p.numel() for p in group["params"]] for group in groups]
    assert len(groups) > 6
    plan = plan_of(changed, 2, parts)
    lines, before = ({line.item: line for line in found.lines} for found in (plan, plain))
    assert lines["AdamW moments"].bytes > before["AdamW moments"].bytes
    assert "passing through" in before["activations of the LLM"].rule
    assert "passing through" not in lines["activations of the LLM"].rule
    assert "backward" in lines["word and sentence level"].phases - before["word and sentence level"].phases


def test_a_rank_under_zero3_plans_too(tmp_path: Path) -> None:
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    recipe = _recipe(tmp_path, "continued_pretraining")
    plain = list(parts_of(recipe).weights())
    keep_alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled() and list(parts_of(recipe).weights()) == plain and is_deepspeed_zero3_enabled()
    del keep_alive


def test_recomputation_and_smaller_batches_take_less(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "continued_pretraining")
    parts = parts_of(recipe)

    def activations(**change: Any) -> int:
        model = recipe.model.model_copy(update={"gradient_checkpointing": change.get("recompute", False)})
        train = recipe.train.model_copy(update={"micro_batch": change.get("micro_batch", 2)})
        lines = plan_of(recipe.model_copy(update={"model": model, "train": train}), 2, parts).lines
        return next(line.bytes for line in lines if line.item == "activations of the LLM")

    assert activations(recompute=True) < 0.5 * activations()
    assert activations(micro_batch=1) * 2 == activations()


def test_auto_shards_no_more_than_it_must(tmp_path: Path, no_reserve: None) -> None:
    sets = ["deepspeed.overrides={zero_optimization: {reduce_bucket_size: 1000}}", "model.gradient_checkpointing=true"]
    recipe = _recipe(tmp_path, "continued_pretraining", *sets, "train.micro_batch=1")
    parts = parts_of(recipe)
    needs = {}
    for base in ("zero1", "zero2", "zero3"):
        section = recipe.deepspeed.model_copy(update={"base": base})
        needs[base] = plan_of(recipe.model_copy(update={"deepspeed": section}), 8, parts).peak_bytes
    assert needs["zero1"] > needs["zero2"]

    def chosen(size: int) -> Any:
        section = recipe.deepspeed.model_copy(update={"base": "auto", "gpu_memory_gib": size / GIB})
        return choose(recipe.model_copy(update={"deepspeed": section}), 8)

    roomy = chosen(needs["zero1"])
    assert roomy.base == "zero1" and roomy.plan.fits and roomy.fixes == []
    assert chosen(needs["zero1"] - 1).base == "zero2"
    assert "zero1 would need" in chosen(needs["zero1"] - 1).reason


def test_auto_recomputes_no_more_layers_than_it_must(tmp_path: Path, no_reserve: None) -> None:
    """Sharding comes first, for it costs less than computing twice."""
    sets = ["train.micro_batch=4", "train.global_batch=32", "train.world_sizes=[8]"]
    recipe = _recipe(tmp_path, "continued_pretraining", *sets)
    parts = parts_of(recipe)

    def peak(base: str, share: float) -> int:
        model = recipe.model.model_copy(update={"gradient_checkpointing": share})
        section = recipe.deepspeed.model_copy(update={"base": base})
        return plan_of(recipe.model_copy(update={"model": model, "deepspeed": section}), 8, parts).peak_bytes

    def chosen(base: str, size: int) -> Any:
        model = recipe.model.model_copy(update={"gradient_checkpointing": "auto"})
        section = recipe.deepspeed.model_copy(update={"base": base, "gpu_memory_gib": size / GIB})
        return choose(recipe.model_copy(update={"model": model, "deepspeed": section}), 8)

    assert peak("zero2", True) < peak("zero2", 0.5) < peak("zero2", False)
    assert chosen("zero2", peak("zero2", False)).recompute is False
    half = chosen("zero2", peak("zero2", 0.5))
    assert 0 < half.recompute <= 0.5 and half.plan.fits and " recomputed: " in half.reason
    sharded = chosen("auto", peak("zero1", False) - 1)
    assert sharded.recompute is False and sharded.base in ("zero2", "zero3")
    nothing = chosen("zero2", 1)
    assert nothing.plan.fits is False and nothing.reason.count("zero2 would need") == 1


def test_the_nearest_recipe_that_fits(tmp_path: Path, no_reserve: None) -> None:
    recipe = _recipe(tmp_path, "continued_pretraining")
    peak = plan_of(recipe, 1, parts_of(recipe)).peak_bytes
    section = recipe.deepspeed.model_copy(update={"gpu_memory_gib": 0.9 * peak / GIB})
    found = choose(recipe.model_copy(update={"deepspeed": section}), 1)
    assert found.plan.fits is False and f"cpu would need {peak / GIB:.1f} GiB" in found.reason
    assert "train.micro_batch=1" in found.fixes
    # no more layers than it takes
    assert any(fix.startswith("model.gradient_checkpointing=0.") for fix in found.fixes), found.fixes
    section = recipe.deepspeed.model_copy(update={"gpu_memory_gib": 1e-6})
    assert choose(recipe.model_copy(update={"deepspeed": section}), 1).fixes == []


def test_passes_over_a_sharded_backbone_are_not_proposed(tmp_path: Path, no_reserve: None) -> None:
    """Neither stage 3 for a recipe with passes, nor passes for one under stage 3."""
    recipe = _recipe(tmp_path, "contrastive", "model.visual.backbone.frames_per_pass=16")
    section = recipe.deepspeed.model_copy(update={"base": "auto", "gpu_memory_gib": 1e-9})
    assert choose(recipe.model_copy(update={"deepspeed": section}), 2).base == "zero2"
    assert choose(recipe.model_copy(update={"deepspeed": section}), 1).base == "zero3_offload"
    recipe = _recipe(tmp_path, "contrastive", "data.max_frames=64")
    peak = plan_of(recipe, 2, parts_of(recipe)).peak_bytes
    section = recipe.deepspeed.model_copy(update={"gpu_memory_gib": 0.8 * peak / GIB})
    assert not any(
        "frames_per_pass" in fix for fix in choose(recipe.model_copy(update={"deepspeed": section}), 2).fixes
    )


def test_an_answer_or_the_problem(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "continued_pretraining")
    said = answer({"recipe": recipe.model_dump(mode="json"), "world_size": 2})
    assert said["base"] == "cpu" and said["fits"] is None and said["plan"]["peak_bytes"] > 0
    recipe = load_recipe(write(tmp_path, CONNECTOR), [f"model.visual.path={tmp_path}"])
    said = answer({"recipe": recipe.model_dump(mode="json"), "world_size": 2})
    assert "model.visual.path: the memory of" in said["problem"] and "without its config" in said["problem"]


def test_an_export_that_is_no_encoder(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("bert").save_pretrained(tmp_path / "bert")
    recipe = load_recipe(write(tmp_path, CONNECTOR), [f"model.visual.path={tmp_path / 'bert'}"])
    said = answer({"recipe": recipe.model_dump(mode="json"), "world_size": 2})
    assert "holds a 'bert' model, not an encoder" in said["problem"]
