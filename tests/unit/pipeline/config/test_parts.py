"""`train.parts`: which part a parameter belongs to, its rate, and rules between parts and the rest of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.parts_rules import unreached
from pipeline.config.parts_schema import PartConfig, part_of
from pipeline.config.rates import Rate, rates_of
from pipeline.errors import RecipeError
from tests.unit.pipeline.config.recipes import CONNECTOR, CONTRASTIVE, PRETRAINING


def write(folder: Path, text: str, parts: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text.replace("  optimizer: {lr: 1e-3}\n", f"  optimizer: {{lr: 1e-3}}\n  parts: {parts}\n"))
    return path


def test_the_longest_path_decides() -> None:
    paths = ("visual", "visual.word", "visual.backbone", "llm", "word_head")
    expected = {
        "visual.word_level.merge.norm.weight": "visual.word", "visual.word_norm.bias": "visual.word",
        "visual.backbone.model.layer.0.weight": "visual.backbone", "visual.frame_norm.weight": "visual",
        "word_head.weight": "word_head", "llm.lm_head.weight": "llm", "connector.up.weight": "", "llmx.weight": "",
    }  # fmt: skip
    assert {name: part_of(name, paths) for name in expected} == expected


def test_rates_fall_from_layer_to_layer() -> None:
    names = [
        "llm.embed.weight", "llm.layers.0.a", "llm.layers.0.b", "llm.layers.1.experts.7.a", "llm.norm.weight",
        "connector.up.weight",
    ]  # fmt: skip
    rates = rates_of(names, {"llm": PartConfig(lr=0.2, lr_decay=0.5, start_step=3)}, 0.4)
    assert [rates[name].scale for name in names] == [0.125, 0.25, 0.25, 0.5, 0.5, 1.0]
    assert {rate.start_step for name, rate in rates.items() if name.startswith("llm")} == {3}
    assert rates["connector.up.weight"] == Rate()
    assert set(rates_of(names, {}, 0.4).values()) == {Rate()}, "without parts all share one group"


def test_layers_of_several_stacks_count_in_their_order() -> None:
    names = ["visual.backbone.layer.0.w", "visual.frame_norm.weight", "visual.blocks.0.w", "visual.blocks.1.w"]
    rates = rates_of(names, {"visual": PartConfig(lr_decay=0.5)}, 1.0)
    assert [rates[name].scale for name in names] == [0.25, 0.25, 0.5, 1.0]


def test_a_part_without_layers_has_no_rates_to_fall() -> None:
    message = r"train\.parts\.connector\.lr_decay=0\.9: connector has no numbered layers"
    with pytest.raises(RecipeError, match=message):
        rates_of(["connector.up.weight"], {"connector": PartConfig(lr_decay=0.9)}, 1.0)


def test_a_part_of_a_new_backbone_fills_its_short_form(tmp_path: Path) -> None:
    text = CONTRASTIVE.replace("tiny: {width: 96, heads: 3, patch_pixels: 16}", "path: vit")
    recipe = load_recipe(write(tmp_path, text, "{visual.backbone: {mode: lora, lora_rank: 4, lora_targets: [query]}}"))
    assert recipe.model.visual is not None and recipe.model.visual.backbone is not None
    backbone = recipe.model.visual.backbone
    assert (backbone.train, backbone.lora_rank, backbone.lora_targets) == ("lora", 4, ["query"])
    assert recipe.train.parts["visual.backbone"].lora_alpha == 16.0
    for written in ("train: frozen", "lora_rank: 2"):
        other = text.replace("path: vit", f"path: vit\n      {written}")
        message = r"model\.visual\.backbone\.\w+=\w+ contradicts train\.parts\.visual\.backbone, which makes it"
        with pytest.raises(RecipeError, match=message):
            load_recipe(write(tmp_path, other, "{visual.backbone: {mode: lora}}"))


@pytest.mark.parametrize(
    ("text", "parts", "message"),
    [
        (CONNECTOR, "{llm: {mode: frozen, lr: 0.1}}", "train.parts.llm.lr is set, but the part's mode is frozen; "),
        (CONNECTOR, "{llm: {lora_rank: 4}}", "train.parts.llm.lora_rank is set, but the part's mode is trained; leave"),
        (CONNECTOR, "{llm: {start_step: 10}}", "train.parts.llm.start_step=10 is not before the end (train.steps=10)"),
        (CONNECTOR, "{llm: {mode: lore}}", "train.parts.llm.mode must be 'frozen', 'lora' or 'trained', got 'lore'"),
        (CONNECTOR, "{visual.word: {lr_deca: 1}}", "lr_deca is not a setting; did you mean train.parts.visual.word.l"),
        (
            PRETRAINING, "{llm: {mode: lora}}",
            "train.parts.llm.mode=lora freezes the new (tiny) weights of model.llm, which no checkpoint would hold",
        ),
        (
            CONTRASTIVE, "{visual.backbone: {mode: frozen}}",
            "train.parts.visual.backbone.mode=frozen freezes the new (tiny) weights of model.visual.backbone",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_their_recipe(tmp_path: Path, text: str, parts: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(write(tmp_path, text, parts))
    assert message in str(raised.value)


def test_new_weights_that_an_export_replaces_may_be_frozen(tmp_path: Path) -> None:
    sets = ["model.init_from.llm=runs/export"]
    assert load_recipe(write(tmp_path, PRETRAINING, "{llm: {mode: lora}}"), sets).train.parts["llm"].mode == "lora"


def test_what_a_stage_does_not_reach(tmp_path: Path) -> None:
    assert unreached(load_recipe(write(tmp_path, CONTRASTIVE, "{}"))) == ()
    recipe = load_recipe(write(tmp_path, CONNECTOR, "{visual.word: {mode: trained, lr: 1e-4}}"))
    assert unreached(recipe) == ("visual.sentence",)
    frames = load_recipe(write(tmp_path, CONNECTOR, "{}"), ["model.connector.tokens=frame"])
    assert unreached(frames) == ("visual.sentence", "visual.word")
