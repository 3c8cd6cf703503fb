"""Frame level of the visual encoder by a video model: windows of a clip's frames -> one token per tubelet step.

A video model (VideoMAE, arXiv 2203.12602; TimeSformer, arXiv 2102.05095; ViViT, arXiv 2103.15691; V-JEPA 2,
arXiv 2506.09985) reads a fixed number of frames and merges a few of them into each step. Every frame of a clip takes
the step that holds it, in the window whose middle is nearest, so that lengths, layouts and stored features stay those
of frames. A clip's last window repeats its last frame.

Legend: N packed frames, G windows, F frames of a window, U steps of a window, P patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import RecipeError
from pipeline.models.clip_layout import ClipLayout


@dataclass(frozen=True, slots=True)
class VideoModel:
    """How a family of video models is called."""

    frames: str = "num_frames"
    """Field of the config: frames of a window."""
    pixels: str = "image_size"
    """Field of the config: side of an image."""
    argument: str = "pixel_values"
    prefix: int = 0
    """Tokens before those of the patches."""
    steps_first: bool = True
    """Whether tokens go through the patches of one step before the next step; else through the steps of one patch."""
    unused: str = ""
    """Part that makes no features: it is taken out."""


VIDEO_MODELS = {
    "videomae": VideoModel(),
    "vivit": VideoModel(prefix=1),
    "timesformer": VideoModel(prefix=1, steps_first=False),
    "vjepa2": VideoModel("frames_per_clip", "crop_size", "pixel_values_videos", unused="predictor"),
}
"""By `model_type`."""


def window_frames(config: PreTrainedConfig) -> int:
    """Frames that a video model reads at once. Raises RecipeError for other models."""
    family = VIDEO_MODELS.get(config.model_type)
    if family is None:
        raise RecipeError(
            f"model.visual.backbone: kind video cannot read {config.model_type!r} models; it knows"
            f" {', '.join(VIDEO_MODELS)}. For an image model set kind: frame."
        )
    return int(getattr(config, family.frames))


def _tubelet(config: PreTrainedConfig) -> int:
    size = getattr(config, "tubelet_size", 1)
    return int(size if isinstance(size, int) else size[0])


class ClipBackbone(nn.Module):
    """Runs a video model over windows of frames: [N, 3, H, W] -> [N, D]. See the module docstring.

    Raises RecipeError for images of another size than the model's, another pooling than the mean over patches, or a
    model of another kind.
    """

    def __init__(self, model: PreTrainedModel, pool: str, image_pixels: int) -> None:
        super().__init__()
        config = model.config
        self.frames = window_frames(config)
        self.family, self.tubelet = VIDEO_MODELS[config.model_type], _tubelet(config)
        side = getattr(config, self.family.pixels)
        side = side if isinstance(side, int) else side[0]
        if side != image_pixels:
            raise RecipeError(
                f"data.image_pixels: {image_pixels}, but the video model reads images of {side}; set that."
            )
        if pool != "mean":
            raise RecipeError(f"model.visual.backbone.pool: {pool!r} with kind video, whose steps have only a mean.")
        if self.family.unused:
            setattr(model, self.family.unused, None)
        self.model, self.image_pixels = model, image_pixels

    def train(self, mode: bool = True) -> ClipBackbone:
        super().train(mode and self.trains)
        return self

    @property
    def trains(self) -> bool:
        """Whether any weight needs a gradient."""
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def forward(self, pixels_GFCHW: Tensor) -> Tensor:
        """Windows of frames [G, F, 3, H, W] -> a vector per frame of every window [G, F, D]."""
        options: dict[str, Any] = {self.family.argument: pixels_GFCHW}
        if self.family.unused:
            options[f"skip_{self.family.unused}"] = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            tokens = self.model(**options).last_hidden_state[:, self.family.prefix :]
            steps = self.frames // self.tubelet
            if self.family.steps_first:
                steps_GUD = tokens.unflatten(1, (steps, -1)).mean(2)
            else:
                steps_GUD = tokens.unflatten(1, (-1, steps)).mean(1)
            return steps_GUD.repeat_interleave(self.tubelet, dim=1)

    def over_clips(self, frames_NHWC: Tensor, layout: ClipLayout, at_once: int, prepare: Any) -> Tensor:
        """Features [N, D] of packed frames.

        Args:
            frames_NHWC: uint8.
            layout: of these clips, with the windows of a video model.
            at_once: windows per call, 0 = all.
            prepare: makes normalised pixels [n, 3, H, W] of frames [n, H, W, 3].
        """
        assert layout.clip_frames_GF is not None and layout.clip_slots_N is not None  # `clip_sizes` asks for them
        parts = layout.clip_frames_GF.split(at_once) if at_once else (layout.clip_frames_GF,)
        seen = []
        for part_GF in parts:
            pixels = prepare(frames_NHWC.index_select(0, part_GF.flatten()))
            seen.append(self(pixels.unflatten(0, part_GF.shape)))
        return torch.cat(seen).flatten(0, 1).index_select(0, layout.clip_slots_N)


__all__ = ["VIDEO_MODELS", "ClipBackbone", "VideoModel", "window_frames"]
