"""Which files a part comes from, and whether they are still the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config.schema import BackboneConfig, LlmConfig, ModelConfig, TinyLlm, VisualConfig
from pipeline.config.transfer_schema import InitFromConfig
from pipeline.errors import CheckpointError
from pipeline.models.sources import SourceDigests, check_unchanged, digests_of, source_folders, source_prefixes
from pipeline.models.weight_files import weight_files


def folder_of(path: Path, **files: bytes) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def test_only_files_that_transformers_loads_count(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}).encode()
    split = folder_of(
        tmp_path / "split", model__safetensors__index__json=index, heads__safetensors=b"", pytorch_model__bin=b""
    )
    assert [path.name for path in weight_files(split)] == ["model-1.safetensors", "model-2.safetensors"]
    (split / "model.safetensors").touch()
    assert [path.name for path in weight_files(split)] == ["model.safetensors"]
    old = folder_of(tmp_path / "old", pytorch_model__bin=b"")
    assert [path.name for path in weight_files(old)] == ["pytorch_model.bin"]
    assert weight_files(tmp_path) == []


def test_folders_of_the_parts_that_are_asked_for(tmp_path: Path) -> None:
    names = ["llm.a.weight", "visual.b", "connector.c"]
    visual = VisualConfig(backbone=BackboneConfig(path=str(folder_of(tmp_path / "vit"))))
    model = ModelConfig(llm=LlmConfig(path=str(tmp_path)), visual=visual)
    assert source_folders(model, names) == {"llm": tmp_path, "visual": tmp_path / "vit"}
    assert source_folders(model, ["llm.a", "connector.b"]) == {"llm": tmp_path}
    assert source_folders(ModelConfig(visual=VisualConfig(path="encoder")), names) == {"visual": Path("encoder")}
    assert source_folders(ModelConfig(llm=LlmConfig(tiny=TinyLlm(), tokenizer="t")), names) == {}


def test_digests_are_computed_beside_the_training(tmp_path: Path) -> None:
    llm = folder_of(tmp_path / "llm", model__safetensors=b"weights")
    digest = {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert SourceDigests({"llm": llm}).get() == {"llm": {"model.safetensors": digest}}
    (llm / "model.safetensors").unlink()
    (llm / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        SourceDigests({"llm": llm}).get()
    (llm / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(KeyError, match="weight_map"):
        SourceDigests({"llm": llm}).get()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.write_bytes(b"Weights"), r"model\.safetensors has changed"),
        (lambda file: file.write_bytes(b"more weights"), r"model\.safetensors has changed"),
        (lambda file: file.unlink(), r"model\.safetensors is missing"),
        (lambda file: file.rename(file.with_name("pytorch_model.bin")), r"model\.safetensors is missing"),
        (
            lambda file: file.rename(file.with_name("model.safetensors.index.json")).write_text(
                '{"weight_map": {"a": "model-1.safetensors"}}'
            ),
            r"model-1\.safetensors was not there",
        ),
    ],
)
def test_a_file_that_changed_is_named(tmp_path: Path, change: object, problem: str) -> None:
    llm = folder_of(tmp_path / "llm", model__safetensors=b"weights")
    recorded = digests_of({"llm": llm})
    check_unchanged(recorded, {"llm": llm})
    change(llm / "model.safetensors")  # type: ignore[operator]
    message = rf"{problem} since the run that froze model\.llm loaded it: an export would hold other weights than those"
    with pytest.raises(CheckpointError, match=message) as raised:
        check_unchanged(recorded, {"llm": llm})
    assert str(llm) in str(raised.value) and raised.value.exit_code == 2


def test_an_export_that_a_run_starts_from_comes_before_the_part_s_own_folder(tmp_path: Path) -> None:
    encoder = folder_of(tmp_path / "encoder")
    save_file({"word_norm.bias": torch.zeros(1)}, encoder / "model.safetensors")
    save_file({"word_head.weight": torch.zeros(1), "log_scale": torch.zeros(1)}, encoder / "heads.safetensors")
    (encoder / "config.json").write_text('{"model_type": "slt_visual"}')
    model = ModelConfig(visual=VisualConfig(path="own"), init_from=InitFromConfig(model=str(encoder)))
    assert source_folders(model, ["visual.word_norm.bias", "log_scale"]) == {"visual": encoder, "heads": encoder}
    assert set(source_prefixes(model)) == {"visual.", "word_head", "log_scale"}
    digests = digests_of({"visual": encoder, "heads": encoder})
    assert {part: list(files) for part, files in digests.items()} == {
        "visual": ["model.safetensors"], "heads": ["heads.safetensors"],
    }  # fmt: skip
