"""Exports of real runs under ZeRO-3: frozen parts from their source folders, adapters kept and merged."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from pipeline.errors import CheckpointError
from pipeline.export.hf import export
from pipeline.models.visual import HierarchicalVisualEncoder
from tests.jobs import TINY_VISUAL, World, run_job
from tests.source_tree import ROOT


@pytest.fixture(scope="module")
def connector(world: World) -> Path:
    """A run whose LLM and visual encoder are frozen, both from copies of folders that a test may change."""
    run_dir, sources = world.root / "runs" / "frozen", world.root / "sources"
    for part in ("llm", "encoder"):
        shutil.copytree(world.root / "reference" / part, sources / part, dirs_exist_ok=True)
    paths = {"model.llm.path": sources / "llm", "model.visual.path": sources / "encoder"}
    if not (run_dir / "checkpoints").exists():
        run_job("connector", world.sets("connector", run_dir, 2, train__steps=2, **paths), 2)
    return run_dir


def test_frozen_parts_are_those_the_run_loaded(world: World, connector: Path, tmp_path: Path) -> None:
    assert max(export(connector, tmp_path / "export").values()) < 1e-4
    found = load_file(tmp_path / "export" / "model.safetensors")
    for part, folder in (("llm", "llm"), ("visual", "encoder")):
        source = load_file(world.root / "sources" / folder / "model.safetensors")
        assert all(torch.equal(found[f"{part}.{name}"], value) for name, value in source.items())


def test_a_frozen_source_that_changed_is_named(world: World, connector: Path, tmp_path: Path) -> None:
    weights = world.root / "sources" / "encoder" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        message = rf"{weights} has changed since the run that froze model\.visual loaded it"
        with pytest.raises(CheckpointError, match=message):
            export(connector, tmp_path / "export", check=False)
    finally:
        weights.write_bytes(whole)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys; from pathlib import Path; from pipeline.export.hf import export
shown = []
def show(*row):
    shown.append(row)
    if len(shown) == 40:
        os.kill(os.getpid(), signal.SIGKILL)
export(Path(sys.argv[1]), Path(sys.argv[2]), check=False, max_shard_bytes=50_000, show=show)
"""


def test_an_export_that_was_killed_goes_on(connector: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    export(connector, whole, check=False, max_shard_bytes=50_000)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(connector), str(cut)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL and not cut.exists()
    finished = {path.name: path.stat().st_ino for path in (tmp_path / ".tmp-cut").glob("*.safetensors")}
    assert 0 < len(finished) < len(list(whole.glob("model-*.safetensors")))
    differences = export(connector, cut, max_shard_bytes=50_000)
    assert max(differences.values()) < 1e-4
    assert all((cut / name).stat().st_ino == inode for name, inode in finished.items()), "the very files"
    card = {"README.md", "provenance.json"}  # say that only one of them was compared with the live model
    left, right = ({p.name: p.read_bytes() for p in out.iterdir() if p.name not in card} for out in (whole, cut))
    assert left == right and {path.name for path in tmp_path.iterdir()} == {"whole", "cut"}


@pytest.fixture(scope="module")
def adapted(world: World) -> Path:
    """A contrastive run with adapters on a pretrained backbone."""
    run_dir, backbone = world.root / "runs" / "adapted", world.root / "backbone"
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if not backbone.exists():
        torch.manual_seed(3)
        config = AutoConfig.for_model("vit", image_size=64, patch_size=16, **sizes)
        AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(backbone)
    begin, _, rest = TINY_VISUAL.partition("tiny: {")
    visual = f"{begin}path: {backbone}, {rest.partition('}, ')[2]}".replace("train: full", "train: lora, lora_rank: 2")
    values = {"model.visual": visual, "train__steps": 3, "train__optimizer__lr": 0.05}
    if not (run_dir / "checkpoints").exists():
        run_job("contrastive", world.sets("contrastive", run_dir, 2, **values), 2)
    return run_dir


def test_adapters_are_kept_or_merged(world: World, adapted: Path, tmp_path: Path) -> None:
    kept, merged = tmp_path / "kept", tmp_path / "merged"
    for out, lora in ((kept, "keep"), (merged, "merge")):
        assert max(export(adapted, out, lora=lora).values()) < 1e-4, "as the live model computes"
    names = load_file(merged / "model.safetensors").keys()
    assert names and not any("lora" in name or "base_layer" in name for name in names)
    assert json.loads((merged / "config.json").read_text())["lora_rank"] == 0
    assert any("lora_B" in name for name in load_file(kept / "model.safetensors"))
    assert not (merged / "backbone_adapter").exists()

    base = AutoModel.from_pretrained(world.root / "backbone", add_pooling_layer=False).eval()
    pixels = torch.rand(2, 3, 64, 64)
    plain = base(pixels).last_hidden_state
    adapter = json.loads((kept / "backbone_adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(world.root / "backbone")
    live = HierarchicalVisualEncoder.from_pretrained(kept).eval().backbone.model(pixels).last_hidden_state
    alone = PeftModel.from_pretrained(base, str(kept / "backbone_adapter"))(pixels).last_hidden_state
    assert torch.allclose(alone, live, atol=1e-5) and not torch.allclose(plain, live, atol=1e-3)
