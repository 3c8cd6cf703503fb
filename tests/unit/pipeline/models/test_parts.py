"""Parts of a whole model: which parameters get a gradient, and plans that do not fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.parts_schema import PartConfig
from pipeline.errors import RecipeError
from pipeline.models.attention import implementation
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.parts import apply_parts
from pipeline.models.registry import build_llava_slt
from tests.unit.pipeline.models.tiny import bpe_tokenizer, clips, data_config, model_config, shake

PLAN = {"visual": False, "connector": True, "llm": False}
UNREACHED = ("visual.sentence",)
LENGTHS, TEXTS = (9, 4), ["tomorrow it rains", "here"]


@pytest.fixture
def build(tmp_path: Path) -> Any:
    bpe_tokenizer(tmp_path)
    return lambda: build_llava_slt(
        model_config(tmp_path), data_config(), "signs: {video} sentence:", torch.float32, implementation("sdpa")
    )


def loss_of(model: Any, processor: Any) -> torch.Tensor:
    frames_NHWC, lengths_B = clips(*LENGTHS)
    loss: torch.Tensor = model(**processor.pack(LENGTHS, TEXTS), frames=frames_NHWC, frame_lengths=lengths_B).loss_sum
    return loss


CASES: dict[str, tuple[dict[str, PartConfig], tuple[str, ...]]] = {
    "as the stage plans": ({}, ("connector.",)),
    "word level": ({"visual.word": PartConfig()}, ("connector.", "visual.word_")),
    "adapters alone": (
        {"connector": PartConfig(mode="frozen"), "llm": PartConfig(mode="lora", lora_rank=2)},
        ("llm.*lora_",),
    ),
    "two kinds of adapters": (
        {"llm": PartConfig(mode="lora", lora_targets=["q_proj"]), "visual.backbone": PartConfig(mode="lora")},
        ("connector.", "llm.*q_proj.lora_", "visual.backbone.*lora_"),
    ),
    "all": (
        {"visual": PartConfig(), "llm": PartConfig(), "llm.model.layers.0": PartConfig(mode="frozen")},
        ("connector.", "visual.backbone", "visual.frame", "visual.word", "llm.model.embed", "llm.model.norm",
         "llm.model.layers.1."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_where_the_plan_says(case: str, recompute: bool, build: Any) -> None:
    parts, beginnings = CASES[case]
    model, processor = build()
    shake(model)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    apply_parts(model, PLAN, parts, UNREACHED)
    model.train()
    loss_of(model, processor).backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    first, last = zip(*((text.partition("*")[0], text.partition("*")[2]) for text in beginnings), strict=True)
    for name, _ in model.named_parameters():
        planned = any(name.startswith(begin) and end in name for begin, end in zip(first, last, strict=True))
        assert (name in found) == planned, name


def test_a_config_rebuilds_the_adapters(build: Any, tmp_path: Path) -> None:
    """Of the language model, of the connector and of the encoder, each where it belongs."""
    model, processor = build()
    lora = {
        path: PartConfig(mode="lora", lora_rank=rank)
        for path, rank in (("llm", 2), ("visual.word", 3), ("visual.backbone", 2), ("connector", 1))
    }
    apply_parts(model, PLAN, lora, UNREACHED)
    shake(model)
    assert {group["rank"] for group in model.config.adapters} == {1, 2}
    assert {group["rank"] for group in model.config.visual_config.adapters} == {2, 3}
    model.eval().save_pretrained(tmp_path / "saved")
    again = LlavaSltForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert set(again.state_dict()) == set(model.state_dict())
    frames_NHWC, lengths_B = clips(*LENGTHS)
    inputs = {**processor(LENGTHS, TEXTS), "frames": frames_NHWC, "frame_lengths": lengths_B}
    again.llm.set_attn_implementation("sdpa")
    model.llm.set_attn_implementation("sdpa")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_an_adapter_that_is_there_is_used(build: Any) -> None:
    model, _ = build()
    apply_parts(model, PLAN, {"llm": PartConfig(mode="lora", lora_rank=2)})
    before = [name for name, _ in model.named_parameters()]
    apply_parts(model, PLAN, {"llm": PartConfig(mode="lora", lora_rank=2)})
    assert [name for name, _ in model.named_parameters()] == before
    message = r"train\.parts\.llm: llm\.\S+ already has an adapter of rank 2 and alpha 16, the recipe says 3 and 16;"
    with pytest.raises(RecipeError, match=message):
        apply_parts(model, PLAN, {"llm": PartConfig(mode="lora", lora_rank=3)})


def test_a_frozen_backbone_trains_only_if_it_is_named(build: Any) -> None:
    for path, trains in (("visual", False), ("visual.backbone", True)):
        model, _ = build()
        model.visual.backbone.requires_grad_(False)
        apply_parts(model, PLAN, {path: PartConfig()}, UNREACHED)
        assert model.visual.backbone.trains is trains


@pytest.mark.parametrize(
    ("path", "part", "message"),
    [
        ("visual.words", PartConfig(), r"train\.parts\.visual\.words: the model has no such part; it has visual, visual"
         r"\.backbone, visual\.frame, visual\.word, visual\.sentence, llm, connector"),
        ("visual.sentence", PartConfig(), r"visual\.sentence\.mode=trained: this stage does not read what visual\.sen"),
        ("visual.word_norm", PartConfig(mode="lora"), r"visual\.word_norm has no linear layer \(torch\.nn\.Linear\) t"),
        ("llm", PartConfig(mode="lora", lora_targets=["query"]), r"lora_targets=\['query'\] name none of its \d+ linear"
         r" layers; they are called down_proj, gate_proj, k_proj"),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit_the_model(build: Any, path: str, part: PartConfig, message: str) -> None:
    model, _ = build()
    with pytest.raises(RecipeError, match=message):
        apply_parts(model, PLAN, {path: part}, UNREACHED)
