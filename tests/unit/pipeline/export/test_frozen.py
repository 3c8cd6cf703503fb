"""Frozen parts of an export come from where the recipe took them, mapped, whatever the folder calls its tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from pipeline.errors import CheckpointError
from pipeline.export.frozen import check_sources, frozen_entries, stored_dtype
from pipeline.export.mapped import MappedFiles
from pipeline.models import registry
from pipeline.models.registry import build_visual, load_llm
from pipeline.models.sources import digests_of
from tests.unit.pipeline.export.runs import recipe_of
from tests.unit.pipeline.models.tiny import PIXELS, bpe_tokenizer, llm_config, shake, visual_config

FOLDERS = {"llm": Path("llm"), "visual": Path("encoder")}


def parts_of(**parts: dict[str, torch.Tensor]) -> Any:
    """Loaders of a recipe's frozen parts, by state dict."""
    return {name: lambda *_, found=found: SimpleNamespace(state_dict=lambda: found) for name, found in parts.items()}


def test_frozen_parts_come_from_where_the_recipe_took_them(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = recipe_of("connector", "model.llm.path=llm", "model.visual.path=encoder")
    loaders = parts_of(
        llm={"embed": torch.ones(2), "tied": torch.ones(2), "other": torch.zeros(2)},
        visual={"norm": torch.full((2,), 2.0), "count": torch.tensor([3])},
    )
    monkeypatch.setattr(registry, "load_llm", loaders["llm"])
    monkeypatch.setattr(registry, "build_visual", loaders["visual"])
    frozen = ["llm.embed", "llm.tied", "visual.norm", "visual.count"]
    plan = {"prefix": "", "tied": ["llm.tied"], "frozen": frozen}
    found = list(frozen_entries(resolved, plan, torch.bfloat16, FOLDERS))
    assert {entry.name: (entry.dtype, entry.read().tolist()) for entry in found} == {
        "llm.embed": (torch.bfloat16, [1, 1]),
        "visual.norm": (torch.bfloat16, [2, 2]),
        "visual.count": (torch.int64, [3]),
    }


def test_a_folder_that_holds_other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = recipe_of("connector", "model.llm.path=llm", "model.visual.path=encoder")
    monkeypatch.setattr(registry, "load_llm", parts_of(llm={"embed": torch.ones(2)})["llm"])
    plan = {"prefix": "", "tied": [], "frozen": ["llm.embed", "llm.layer.9", "llm.layer.10"]}
    message = (
        r"2 frozen parameters were not found where the recipe loads them from, first llm\.layer\.10; "
        "the source folders changed since training"
    )
    with pytest.raises(CheckpointError, match=message):
        list(frozen_entries(resolved, plan, torch.float32, FOLDERS))


def frozen_of(part: str, model: torch.nn.Module) -> dict[str, Any]:
    return {"prefix": "", "tied": [], "frozen": [f"{part}.{name}" for name, _ in model.named_parameters()]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_language_model_with_tied_weights_stays_on_the_disk(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    bpe_tokenizer(tmp_path / "tokenizer")
    model = load_llm(llm_config(tmp_path / "tokenizer"), torch.float32)
    model.save_pretrained(tmp_path / "llm")
    if kind == "bin":  # as folders were before safetensors
        weights = load_file(tmp_path / "llm" / "model.safetensors")
        torch.save(weights, tmp_path / "llm" / "pytorch_model.bin")
        del weights
        (tmp_path / "llm" / "model.safetensors").unlink()
    resolved = recipe_of("connector", f"model.llm.path={tmp_path / 'llm'}", "model.visual.path=encoder")
    plan = frozen_of("llm", model)
    assert stored_dtype(tmp_path / "llm", dtype) == torch.float32, "loaded as stored, cast when written"
    found = {entry.name: entry for entry in frozen_entries(resolved, plan, dtype, {"llm": tmp_path / "llm"})}
    assert found.keys() == set(plan["frozen"]) and all(entry.dtype == dtype for entry in found.values())
    for name, value in model.named_parameters():
        assert torch.equal(found[f"llm.{name}"].read(), value.data)
    assert_mapped(found["llm.model.embed_tokens.weight"].read(), tmp_path / "llm")


def assert_mapped(tensor: torch.Tensor, folder: Path) -> None:
    ranges = MappedFiles([folder]).ranges
    assert any(begin <= tensor.data_ptr() < end for begin, end in ranges), "its pages are those of the file"


def test_an_exported_encoder(tmp_path: Path) -> None:
    encoder = build_visual(visual_config(), PIXELS, torch.float32)
    shake(encoder)
    encoder.save_pretrained(tmp_path / "encoder")
    sets = (f"model.visual.path={tmp_path / 'encoder'}", "model.llm.path=llm", f"data.image_pixels={PIXELS}")
    found = frozen_entries(
        recipe_of("connector", *sets), frozen_of("visual", encoder), torch.float32, {"visual": tmp_path / "encoder"}
    )
    tensors = {entry.name: entry.read() for entry in found}
    assert all(torch.equal(tensors[f"visual.{name}"], value) for name, value in encoder.named_parameters())


def test_a_folder_whose_names_differ_from_the_module_s(tmp_path: Path) -> None:
    """A backbone saved inside another model has a prefix; with adapters, its layers are one level deeper."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("vit", image_size=PIXELS, patch_size=16, **sizes)
    backbone = AutoModel.from_config(config, add_pooling_layer=False)
    config.save_pretrained(tmp_path / "vit")
    weights = {f"vit.{name}": value for name, value in backbone.state_dict().items()}
    save_file(weights, tmp_path / "vit" / "model.safetensors", metadata={"format": "pt"})
    visual = f"{{backbone: {{path: {tmp_path / 'vit'}, train: lora, lora_rank: 2}}}}"
    resolved = recipe_of("contrastive", f"model.visual={visual}", f"data.image_pixels={PIXELS}")
    assert resolved.recipe.model.visual is not None
    encoder = build_visual(resolved.recipe.model.visual, PIXELS, torch.float32)
    frozen = [f"visual.{name}" for name, value in encoder.named_parameters() if not value.requires_grad]
    plan = {"prefix": "visual.", "tied": [], "frozen": frozen}
    assert any("base_layer" in name for name in frozen)
    found = {e.name: e.read() for e in frozen_entries(resolved, plan, torch.float32, {"visual": tmp_path / "vit"})}
    assert found.keys() == set(frozen)
    for name, tensor in found.items():
        plain = name.removeprefix("visual.backbone.model.").replace(".base_layer.", ".")
        assert torch.equal(tensor, backbone.state_dict()[plain])
        assert_mapped(tensor, tmp_path / "vit")


def test_several_types_in_one_folder_are_loaded_as_the_run_did(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    mixed = {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.bfloat16), "c": torch.zeros(1, dtype=torch.int8)}
    save_file(mixed, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path, torch.float16) == torch.float16
    assert "holds 2 types of floats; its weights are loaded into memory" in caplog.text


def test_sources_are_checked_before_anything_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "llm").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "llm" / "model.safetensors")
    resolved = recipe_of("connector", f"model.llm.path={tmp_path / 'llm'}", "model.visual.path=encoder")
    folders = {"llm": tmp_path / "llm"}
    plan: dict[str, Any] = {"frozen": ["llm.a"], "sources": digests_of(folders)}
    assert check_sources(resolved, plan) == folders and not caplog.records
    save_file({"a": torch.ones(1)}, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"llm/model\.safetensors has changed since the run that froze model\.llm"
    ):
        check_sources(resolved, plan)
    del plan["sources"]
    assert check_sources(resolved, plan) == folders
    assert "the checkpoint does not say what the weight files of its frozen parts were" in caplog.text


def test_frozen_new_weights_are_nowhere() -> None:
    plan = {"frozen": ["visual.backbone.w"]}
    message = r"model\.visual holds frozen parameters with new \(tiny\) weights, which no checkpoint and no folder"
    with pytest.raises(CheckpointError, match=message):
        check_sources(recipe_of("contrastive"), plan)


def test_frozen_parts_come_from_the_export_that_the_run_started_from(tmp_path: Path) -> None:
    """Not from the part's own path, whose weights they have replaced."""
    (tmp_path / "config.json").write_text('{"model_type": "llava_slt"}')
    save_file({"llm.embed": torch.ones(2), "connector.up": torch.ones(3)}, tmp_path / "model.safetensors")
    resolved = recipe_of(
        "connector", "model.llm.path=llm", "model.visual.path=encoder", f"model.init_from.llm={tmp_path}"
    )
    plan = {"prefix": "", "tied": [], "frozen": ["llm.embed"], "sources": digests_of({"llm": tmp_path})}
    folders = check_sources(resolved, plan)
    assert folders == {"llm": tmp_path}
    found = list(frozen_entries(resolved, plan, torch.bfloat16, folders))
    assert [(entry.name, entry.dtype, entry.read().tolist()) for entry in found] == [
        ("llm.embed", torch.bfloat16, [1, 1])
    ]
    save_file({"llm.embed": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed since the run that froze model\.llm"):
        check_sources(resolved, plan)
