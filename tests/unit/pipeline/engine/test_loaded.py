"""Weights that did not reach the model; ZeRO-3 is in tests/multiproc/test_loaded_ranks.py."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.config.schema import BackboneConfig, LlmConfig, ModelConfig, VisualConfig
from pipeline.engine.loaded import check_loaded
from pipeline.errors import CheckpointError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.llm = nn.ModuleDict({"model": nn.ModuleDict({f"l{n}": nn.Linear(3, 3) for n in range(5)})})
        self.visual = nn.ModuleDict({"backbone": nn.ModuleDict({"model": nn.ModuleDict({"embed": nn.Linear(2, 4)})})})


def saved(module: nn.Module, prefix: str, folder: Path, rename: str = "") -> str:
    folder.mkdir()
    tensors = {name: value.contiguous() for name, value in module.state_dict().items() if name.startswith(prefix)}
    save_file(
        {rename + name.removeprefix(prefix): value for name, value in tensors.items()}, folder / "model.safetensors"
    )
    return str(folder)


def test_parts_that_arrived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Small()
    llm = saved(module, "llm.", tmp_path / "llm")
    backbone = saved(module, "visual.backbone.model.", tmp_path / "backbone", rename="vit.")
    visual = VisualConfig(backbone=BackboneConfig(path=backbone))
    with caplog.at_level(logging.INFO):
        check_loaded(module, ModelConfig(llm=LlmConfig(path=llm), visual=visual))
    assert "4 sampled tensors equal those of their files" in caplog.text, "three of the LLM, one of the backbone"
    check_loaded(module.to(torch.bfloat16), ModelConfig(llm=LlmConfig(path=llm)))
    check_loaded(module, ModelConfig(llm=LlmConfig(path="org/hub-id"), visual=VisualConfig(path=str(tmp_path / "no"))))


def test_a_tensor_that_did_not(tmp_path: Path) -> None:
    module = Small()
    model = ModelConfig(llm=LlmConfig(path=saved(module, "llm.model.", tmp_path / "llm")))
    with torch.no_grad():
        module.llm["model"]["l0"].weight[1, 2] += 0.5  # type: ignore[index]
    text = (
        rf"model\.llm\.path: l0\.weight of {tmp_path}/llm/model\.safetensors did not reach the model, which differs by"
    )
    with pytest.raises(CheckpointError, match=text):
        check_loaded(module, model)
    with torch.no_grad():
        module.llm["model"]["l0"].weight.fill_(float("nan"))  # type: ignore[index]
    with pytest.raises(CheckpointError, match="differs by up to nan"):
        check_loaded(module, model)


def test_weights_of_an_export_that_the_run_started_from(tmp_path: Path) -> None:
    module = Small()
    model = ModelConfig(llm=LlmConfig(path=saved(Small(), "llm.", tmp_path / "llm")))
    translator = saved(module, "", tmp_path / "translator")
    check_loaded(module, model, {"llm": Path(translator), "visual": Path(translator)})
    with torch.no_grad():
        module.visual["backbone"]["model"]["embed"].weight.add_(1.0)  # type: ignore[index]
    text = r"model\.init_from \(visual\): visual\.backbone\.model\.embed\.weight of .* did not reach the model"
    with pytest.raises(CheckpointError, match=text):
        check_loaded(module, model, {"visual": Path(translator)})
