"""Frame level of the visual encoder: any Hugging Face vision backbone, one vector per frame.

Legend: N packed frames, P tokens of a frame (prefix tokens, then patches), D width of the backbone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from pipeline.errors import RecipeError
from pipeline.models.lora import add_lora, linear_layers, matching

POOLS = ("cls", "mean", "cls_mean")


def normalise(frames_NHWC: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """uint8 frames -> normalised [N, 3, H, W] in ``dtype``; the arithmetic is float32 whatever ``dtype`` is.

    The constants are Python numbers rather than buffers: a cast of the model to bfloat16 must not round them.
    """
    pixels = frames_NHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    for channel, (centre, spread) in enumerate(zip(mean, std, strict=True)):
        pixels[:, channel].mul_(1.0 / (255.0 * spread)).sub_(centre / spread)
    return pixels.to(dtype)


def vision_config(path: str) -> PreTrainedConfig:
    """Config of the vision tower in a folder; for a dual encoder (CLIP, SigLIP), of its vision half."""
    config = AutoConfig.from_pretrained(path)
    half = getattr(config, "vision_config", None)
    config = config if half is None else half
    if type(config) not in MODEL_MAPPING:
        raise RecipeError(
            f"model.visual.backbone.path: {path!r} holds a {config.model_type!r} model, which AutoModel cannot build"
            " as a vision tower. Use a vision encoder such as DINOv2, SigLIP or ViT."
        )
    return config


def backbone_options(config: PreTrainedConfig) -> dict[str, object]:
    """Constructor arguments that leave out pooling heads, whose weights would never get a gradient."""
    kind: Any = MODEL_MAPPING[type(config)]
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}


def new_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with random weights (also under ZeRO-3)."""
    return AutoModel.from_config(config, **backbone_options(config))


def feature_width(config: PreTrainedConfig) -> int:
    """Channels of the last hidden state. Raises RecipeError when the config does not say."""
    for name in ("hidden_size", "hidden_dim"):
        if isinstance(width := getattr(config, name, None), int):
            return width
    if sizes := getattr(config, "hidden_sizes", None):
        return int(sizes[-1])
    raise RecipeError(
        f"model.visual.backbone: the config of {config.model_type!r} has no hidden_size, hidden_dim or hidden_sizes;"
        " use a backbone whose config states its feature width."
    )


def pooled_width(config: PreTrainedConfig, pool: str) -> int:
    """Channels of one pooled frame."""
    return feature_width(config) * (2 if pool == "cls_mean" else 1)


class NoBackbone(nn.Module):
    """Stands where the backbone is, in an encoder whose frames come as stored rows."""

    trains = False


class FrameBackbone(nn.Module):
    """Runs the backbone over frames and pools each to one vector [N, D or 2D].

    Builds gradients only if a backbone weight needs one; otherwise the backbone runs in eval mode.
    """

    def __init__(self, model: PreTrainedModel, pool: str, image_pixels: int) -> None:
        super().__init__()
        self.model = model
        self.pool, self.image_pixels = pool, image_pixels
        config = model.config
        patch = getattr(config, "patch_size", None)
        self.patch: int | None = patch if isinstance(patch, int) else (patch[0] if patch else None)
        if self.patch and image_pixels % self.patch:
            raise RecipeError(
                f"data.image_pixels: {image_pixels} is not a multiple of the backbone's patch size {self.patch};"
                f" use {max(1, round(image_pixels / self.patch)) * self.patch}."
            )
        takes = inspect.signature(type(model).forward).parameters
        other_size = getattr(config, "image_size", image_pixels) not in (image_pixels, [image_pixels] * 2)
        self.options = {"interpolate_pos_encoding": True} if other_size and "interpolate_pos_encoding" in takes else {}

    def train(self, mode: bool = True) -> FrameBackbone:
        super().train(mode and self.trains)
        return self

    @property
    def trains(self) -> bool:
        """Whether any backbone weight (LoRA included) needs a gradient."""
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            return self._pool(self.model(pixels_NCHW, **self.options).last_hidden_state)

    def _pool(self, tokens: Tensor) -> Tensor:
        if tokens.dim() == 4:  # convolutional backbones: [N, D, height, width]
            prefix, patches = 0, tokens.flatten(2).transpose(1, 2)
        else:
            grid = (self.image_pixels // self.patch) ** 2 if self.patch else tokens.shape[1]
            prefix, patches = tokens.shape[1] - grid, tokens
        if self.pool == "mean":
            return patches[:, max(prefix, 0) :].mean(1)
        if prefix < 1:
            raise RecipeError(
                f"model.visual.backbone.pool: {self.pool!r} needs a class token and"
                f" {self.model.config.model_type!r} has none; use pool: mean."
            )
        if self.pool == "cls":
            return tokens[:, 0]
        return torch.cat((tokens[:, 0], patches[:, prefix:].mean(1)), dim=-1)


def add_adapters(model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str] = ()) -> None:
    """Puts LoRA adapters on the linear layers of the backbone, in place, and freezes the rest.

    Args:
        targets: ends of the layers' names, as `model.visual.backbone.lora_targets`; empty = every linear layer.

    Raises:
        RecipeError: there is no such layer.
    """
    layers = linear_layers(model)
    wanted = matching(layers, targets)
    if not wanted:
        there = f"{len(layers)} linear layers" + (f", none of them {list(targets)}" if targets else "")
        raise RecipeError(
            f"model.visual.backbone.train=lora: the {model.config.model_type!r} backbone has {there}; use train: full"
            " or frozen, or other lora_targets."
        )
    model.requires_grad_(False)
    add_lora(model, wanted, rank, alpha)
