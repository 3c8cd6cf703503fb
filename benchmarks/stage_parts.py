"""Random weights in the folders that the video stages read: a language model, a frame backbone, a visual encoder around
it, and the backbone's features of video shards. Only shapes matter to what is timed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Parts:
    """Where they are made, and how large."""

    folder: Path
    tokenizer: Path
    llm: dict[str, int]
    """`TinyLlm` sizes."""
    backbone: dict[str, int]
    """DINOv2: hidden_size, num_hidden_layers, num_attention_heads, image_size."""
    visual: str
    """Other fields of `model.visual`, YAML flow style without braces."""
    device: str = "cpu"

    @property
    def llm_folder(self) -> Path:
        return self.folder / "llm"

    @property
    def encoder_folder(self) -> Path:
        return self.folder / "encoder"

    def visual_set(self, train: str, frames_per_pass: int = 0) -> str:
        """`model.visual` of a new encoder around the backbone."""
        backbone = f"{{path: {self.folder / 'backbone'}, train: {train}, frames_per_pass: {frames_per_pass}}}"
        return f"model.visual={{backbone: {backbone}, {self.visual}}}"


def make_parts(parts: Parts, pixels: int, dtype: torch.dtype) -> None:
    """Write what is not there yet."""
    from pipeline.config.load import load_recipe
    from pipeline.config.schema import LlmConfig, TinyLlm
    from pipeline.models.language import load_language
    from pipeline.models.registry import build_visual

    if parts.encoder_folder.is_dir():
        return
    torch.manual_seed(0)
    with torch.device(parts.device):
        _backbone(parts)
        config = LlmConfig(tiny=TinyLlm(**parts.llm), tokenizer=str(parts.tokenizer))
        llm, tokenizer = load_language(config, dtype)
    tokenizer.save_pretrained(parts.llm_folder)
    llm.save_pretrained(parts.llm_folder)
    recipe = load_recipe("demo_contrastive", [parts.visual_set("frozen"), f"data.image_pixels={pixels}"])
    assert recipe.model.visual is not None
    build_visual(recipe.model.visual, pixels, dtype).save_pretrained(parts.encoder_folder)


def _backbone(parts: Parts) -> None:
    from transformers import Dinov2Config, Dinov2Model

    folder = parts.folder / "backbone"
    sizes: dict[str, Any] = {"mlp_ratio": 4, "patch_size": 14, **parts.backbone}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    normalisation = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation), encoding="utf-8")


def extract_features(parts: Parts, shards: Path, sets: list[str], workers: int) -> Path:
    """Feature shards of the frozen backbone beside the parts.

    Args:
        sets: `data.image_pixels` and `train.precision` of the runs that read them.
    """
    from pipeline.inference.extract_features import extract
    from shards.build.features import FeatureOptions

    out = parts.folder / "features"
    if not (out / "manifest.json").is_file():
        extract("demo_contrastive", [parts.visual_set("frozen"), *sets], shards, out, FeatureOptions(workers=workers))
    return out
