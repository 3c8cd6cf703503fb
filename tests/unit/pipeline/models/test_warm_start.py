"""Weights of an export reach a new model whole, or an error names everything that does not fit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pipeline.config.inputs_schema import FeaturesConfig
from pipeline.config.schema import BackboneConfig, ContrastiveConfig, ModelConfig, TinyLlm, TinyVit, WordLevelConfig
from pipeline.config.transfer_schema import InitFromConfig
from pipeline.errors import RecipeError
from pipeline.models.contrastive import ContrastiveModel
from pipeline.models.exported import Export, init_folders, part_of
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.registry import build_llava_slt, build_visual
from pipeline.models.visual import HierarchicalVisualEncoder
from pipeline.models.warm_start import warm_start
from tests.unit.pipeline.models.tiny import (
    PIXELS,
    bpe_tokenizer,
    clips,
    data_config,
    model_config,
    shake,
    visual_config,
)

TEXT_WIDTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Exports of stages 2 and 3, and the tokenizer."""
    folder = tmp_path_factory.mktemp("exports")
    bpe_tokenizer(folder)
    model = llava(folder)
    shake(model)
    export(model, folder / "translator")
    bpe_tokenizer(folder / "translator")
    towers = contrastive(seed=5)
    shake(towers)
    towers.set_text_statistics({"sentence_mean": torch.full((TEXT_WIDTH,), 3.0)})
    export(towers.visual, folder / "encoder")
    heads = {name: value for name, value in towers.state_dict().items() if not name.startswith("visual.")}
    save_file(heads, folder / "encoder" / "heads.safetensors")
    yield folder


def export(model: PreTrainedModel, folder: Path) -> None:
    """As `slt export` writes it: under the live model's names."""
    model.config.save_pretrained(folder)
    tied = {id(value): name for name, value in reversed(model.state_dict(keep_vars=True).items())}
    save_file({name: model.state_dict()[name] for name in tied.values()}, folder / "model.safetensors")


def llava(folder: Path, **parts: Any) -> LlavaSltForConditionalGeneration:
    model, _ = build_llava_slt(model_config(folder, **parts), data_config(), "{video}", torch.float32)
    return model


def contrastive(seed: int = 0, text_width: int = TEXT_WIDTH, **options: Any) -> ContrastiveModel:
    torch.manual_seed(seed)
    visual = build_visual(visual_config(), PIXELS, torch.float32)
    return ContrastiveModel(visual, text_width, ContrastiveConfig(embed=8, **options))


def recipe(folder: Path, **init_from: Path) -> ModelConfig:
    given = InitFromConfig(**{part: str(path) for part, path in init_from.items()})
    return model_config(folder, init_from=given)


def equal(module: torch.nn.Module, prefix: str, files: Path) -> bool:
    """Whether everything below a prefix is what the files hold."""
    held = {name: tensor for file in files.glob("*.safetensors") for name, tensor in load_file(file).items()}
    own = {name: value for name, value in module.state_dict().items() if name.startswith(prefix)}
    stored = {name: held.get(name, held.get(name.removeprefix("visual."))) for name in own}
    known = {name: value for name, value in stored.items() if value is not None}
    return len(known) >= len(own) - 1 and all(torch.equal(own[name], value) for name, value in known.items())


def test_a_whole_model_is_taken_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llava(folder)
    caplog.set_level(logging.INFO)
    loaded = warm_start(model, recipe(folder, model=folder / "translator"))
    assert loaded == dict.fromkeys(("visual", "connector", "llm"), folder / "translator")
    assert equal(model, "", folder / "translator")
    assert model.llm.lm_head.weight is model.llm.get_input_embeddings().weight
    assert f"model.init_from: connector: 4 tensors of {folder / 'translator'}" in caplog.text


def test_a_part_of_its_own_comes_before_the_model(folder: Path) -> None:
    model = llava(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = recipe(folder, model=folder / "encoder", connector=folder / "translator")
    assert warm_start(model, given).keys() == {"visual", "connector"}
    assert equal(model, "visual.", folder / "encoder") and equal(model, "connector.", folder / "translator")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if "llm." in name)
    assert init_folders(given)["heads"] == folder / "encoder", "which this model does not have"


def test_heads_scales_and_text_statistics_are_taken_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = contrastive(seed=1, sentence_loss="sigmoid")
    assert warm_start(model, recipe(folder, model=folder / "encoder")).keys() == {"visual", "heads"}
    stored = load_file(folder / "encoder" / "heads.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in stored.items())
    assert model.sentence_mean.tolist() == [3.0] * TEXT_WIDTH
    assert "holds no sentence_bias: new weights" in caplog.text


def test_a_run_that_goes_on_loads_only_what_no_checkpoint_holds(folder: Path) -> None:
    model = llava(folder)
    given = recipe(folder, model=folder / "translator")
    assert warm_start(model, given, only=set()) == {}
    assert warm_start(model, given, only={"llm"}).keys() == {"llm"}
    assert equal(model, "llm.", folder / "translator") and not equal(model, "visual.", folder / "translator")


def test_stored_features_belong_to_the_backbone_that_was_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "encoder", tmp_path / "encoder")
    model = contrastive()
    warm_start(model, recipe(folder, visual=tmp_path / "encoder"))
    own = build_visual(visual_config(path=str(tmp_path / "encoder"), backbone=None), PIXELS, torch.float32)
    assert model.visual.config.backbone_fingerprint == own.config.backbone_fingerprint != ""
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({**config, "backbone_fingerprint": "of its source"}))
    warm_start(model, recipe(folder, visual=tmp_path / "encoder"))
    assert model.visual.config.backbone_fingerprint == "of its source"


def refusal(module: torch.nn.Module, model: ModelConfig) -> str:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RecipeError) as error:
        warm_start(module, model)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items()), "nothing was loaded"
    return str(error.value)


def test_every_tensor_of_other_width_is_named(folder: Path) -> None:
    small = {"width": 16, "word": WordLevelConfig(layers=3, window_frames=4, stride=4, heads=2)}
    text = refusal(llava(folder, visual=visual_config(**small)), recipe(folder, model=folder / "translator"))
    assert text.startswith("model.init_from does not fit this recipe's model:\n  ")
    assert (
        f"visual of {folder / 'translator'}: visual.frame_projection.weight is (32, 24) in the export, (16, 24)" in text
    )
    assert "connector.up.weight is (256, 32) in the export, (256, 16) in the model" in text
    assert "fix: build the model as the export's recipe.resolved.yaml says, or take fewer parts from it" in text


def test_missing_and_surplus_tensors_and_other_settings_are_named(folder: Path) -> None:
    other = visual_config(word=WordLevelConfig(layers=4, window_frames=8, stride=4, heads=2), centre_clips=False)
    text = refusal(llava(folder, visual=other), recipe(folder, visual=folder / "encoder"))
    assert "window_frames is 4 in the export, 8 in the model" in text
    assert "centre_clips is True in the export, False in the model" in text
    assert "visual.word_level" in text and "is not in the export" in text
    fewer = visual_config(word=WordLevelConfig(layers=2, window_frames=4, stride=4, heads=2))
    assert "is not in the model" in refusal(llava(folder, visual=fewer), recipe(folder, visual=folder / "encoder"))


def test_a_long_list_is_cut(folder: Path) -> None:
    sizes = TinyLlm(width=16, layers=9, heads=2, feed_forward=24, max_positions=128)
    llm = model_config(folder).llm
    assert llm is not None
    wide = llava(folder, llm=llm.model_copy(update={"tiny": sizes}))
    assert "  and 33 more\n" in refusal(wide, recipe(folder, llm=folder / "translator"))


def test_an_export_without_the_part(folder: Path) -> None:
    text = refusal(llava(folder), recipe(folder, connector=folder / "encoder"))
    assert f"connector of {folder / 'encoder'}: the export holds no connector; it has heads, visual" in text
    assert "the export holds no heads; it has connector, llm, visual" in refusal(
        contrastive(), recipe(folder, heads=folder / "translator")
    )
    assert "text_token_head.weight is (8, 12) in the export, (8, 13) in the model" in refusal(
        contrastive(text_width=13), recipe(folder, heads=folder / "encoder")
    )


def test_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "translator"
    shutil.copytree(folder / "translator", other)
    bpe_tokenizer(other, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    text = refusal(llava(folder), recipe(folder, llm=other))
    assert f"its tokenizer makes other ids than {folder}; set model.llm.tokenizer to {other}" in text
    (other / "tokenizer.json").unlink()
    assert "the export holds no tokenizer.json" in refusal(llava(folder), recipe(folder, llm=other))


def test_what_is_no_export(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"model\.init_from: .*empty cannot be read: .*; give a folder of `slt export`"
    ):
        Export(tmp_path / "empty")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"holds no safetensors files; give a folder of `slt export`"):
        Export(tmp_path)
    assert part_of("log_scale") == part_of("word_head.weight") == "heads" and part_of("llm.model.x") == "llm"


def test_new_adapters_stay_around_the_layers_that_are_loaded(folder: Path) -> None:
    backbone = BackboneConfig(tiny=TinyVit(width=24, layers=1, heads=2, feed_forward=32), train="lora", lora_rank=2)
    torch.manual_seed(3)
    encoder = build_visual(visual_config(backbone=backbone), PIXELS, torch.float32)
    model = ContrastiveModel(encoder, TEXT_WIDTH, ContrastiveConfig(embed=8))
    warm_start(model, recipe(folder, visual=folder / "encoder"))
    stored, own = load_file(folder / "encoder" / "model.safetensors"), dict(encoder.named_parameters())
    adapted = [name for name in own if ".base_layer." in name]
    assert adapted and all(torch.equal(own[name], stored[name.replace(".base_layer.", ".")]) for name in adapted)
    assert all(value.eq(0).all() for name, value in own.items() if ".lora_B." in name), "as new ones are"
    frames_NHWC, lengths_B = clips(5, 3)
    plain = HierarchicalVisualEncoder.from_pretrained(folder / "encoder").eval()
    with torch.no_grad():
        words = [part.eval()(frames_NHWC, lengths_B).words_MD for part in (plain, encoder)]
    assert torch.allclose(*words, atol=1e-6)


def test_stored_features_of_another_kind(folder: Path, tmp_path: Path) -> None:
    def reading(fingerprint: str) -> ContrastiveModel:
        features = FeaturesConfig(fingerprint=fingerprint, width=20)
        visual = build_visual(visual_config(backbone=None, features=features), PIXELS, torch.float32)
        return ContrastiveModel(visual, TEXT_WIDTH, ContrastiveConfig(embed=8))

    export(reading("i3d").visual, tmp_path)
    assert warm_start(reading("i3d"), recipe(folder, visual=tmp_path)).keys() == {"visual"}
    text = refusal(reading("s3d"), recipe(folder, visual=tmp_path))
    assert "the stored features it was trained on are others than those of model.visual.features" in text
