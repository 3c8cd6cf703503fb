"""Frame features of a frozen backbone, computed once and stored as shards (`slt shards features`).

Training on them skips video decoding and the backbone; the exported encoder still holds the backbone and translates
raw video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.load import load_recipe
from pipeline.config.schema import Recipe
from pipeline.errors import RecipeError
from pipeline.inference.augment import Augment
from pipeline.models.registry import build_visual
from pipeline.models.visual import HierarchicalVisualEncoder
from shards.build.features import FeatureOptions, write_features
from shards.schema import Manifest

_FRAMES_PER_PASS = 64


class FrozenBackbone:
    """The backbone of a recipe's visual encoder as `write_features` needs it: frames in, features out.

    Args:
        encoder: built by `build_visual`; its backbone must be pretrained and frozen.
        device: where it runs.
        change: makes the views after the first; part of the identity.
    """

    def __init__(self, encoder: HierarchicalVisualEncoder, device: torch.device, change: Augment | None = None) -> None:
        config = encoder.config
        encoder.to(device)  # type: ignore[arg-type]  # transformers annotates only its own overload
        self.encoder, self.device = encoder.eval(), device
        self.image_pixels: int = config.image_pixels
        self.frames_per_pass = config.frames_per_pass or _FRAMES_PER_PASS
        self.identity: dict[str, Any] = {
            "fingerprint": config.backbone_fingerprint,
            "width": encoder.stored_width(),
            "pool": config.pool,
            "image_pixels": config.image_pixels,
            "precision": str(encoder.dtype).removeprefix("torch."),
        }
        if change is not None:
            self.identity |= {"augment": change.config.of_pictures(), "augment_seed": change.seed}

    def __call__(self, frames_THWC: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [T, P]."""
        passes = torch.from_numpy(frames_THWC).split(self.frames_per_pass)
        with torch.inference_mode():
            return torch.cat([self.encoder.pooled(part.to(self.device)).float().cpu() for part in passes]).numpy()


def extract(
    recipe: str | Path,
    sets: Sequence[str],
    shards: Path,
    out: Path,
    options: FeatureOptions,
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write the features of every clip of `shards` to the folder `out`.

    Args:
        recipe: its `model.visual` names the backbone, its `data.image_pixels` the size, and its `data.augment` what
            changes the pictures of the views after the first.
        sets: overrides, as for training.
        shards: a video shard set.
        out: new folder; a killed extraction continues.
        on_progress: called with (clips done, all clips).

    Raises:
        RecipeError: the recipe has no visual encoder, or its backbone has random weights or would train; or it says
            nothing of how views differ.
        DataError: the shards are unusable.
    """
    loaded = load_recipe(recipe, list(sets))
    visual = loaded.model.visual
    if visual is None:
        raise RecipeError(f"{recipe}: has no model.visual, so there is no backbone to compute features with")
    if loaded.model.init_from.visual or loaded.model.init_from.model:
        raise RecipeError(
            f"{recipe}: model.init_from gives the encoder other weights than model.visual says; name that export as"
            " model.visual.path"
        )
    change = _change(loaded, options.views, str(recipe))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if loaded.train.precision == "bf16" else torch.float32
    encoder = build_visual(visual, loaded.data.image_pixels, dtype)
    if encoder.config.backbone_config is None:
        raise RecipeError(f"{recipe}: model.visual has no backbone; it reads rows that are stored already")
    if encoder.config.clip_stride:
        raise RecipeError(
            f"{recipe}: features of a video model depend on the frames it reads together, which data.frame_stride and"
            " data.max_frames choose in training; train on the videos"
        )
    if not encoder.config.backbone_fingerprint:
        raise RecipeError(
            f"{recipe}: model.visual.backbone must be pretrained (path) and frozen (train: frozen); features of one"
            " that is random or will change would be worthless"
        )
    return write_features(shards, out, FrozenBackbone(encoder, device, change), options, on_progress, change)


def _change(recipe: Recipe, views: int, where: str) -> Augment | None:
    augment = recipe.data.augment
    if views == 1:
        return None
    if not augment.of_pictures():
        raise RecipeError(
            f"{where}: {views} views of every clip are asked for, but data.augment changes no picture, so they would"
            " all be the same; set data.augment.crop_area or another setting of pictures, or ask for one view"
        )
    return Augment(augment, recipe.seed)
