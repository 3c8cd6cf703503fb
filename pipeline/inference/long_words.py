"""Word tokens of a video of any length: computed window by window, and equal to those of the whole.

Word level looks at frames inside windows only (`pipeline.models.word_level`), so a token depends on few frames around
it. A window that begins on the grid of the whole clip and is read with a *halo* of frames on both sides gives the very
tokens of the whole clip, up to rounding (rotary positions enter as differences).

Legend: T frames, S word tokens, P pooled width, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import RecipeError
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.visual import STILL_CLIP, HierarchicalVisualEncoder, VisualEncoderConfig


def grid_frames(config: VisualEncoderConfig) -> int:
    """Frames between two places where all windows of a clip begin together: those of word tokens are the longest."""
    return config.window_frames * config.stride


def halo_frames(config: VisualEncoderConfig) -> int:
    """Frames on each side that a word token of a grid cell depends on, beyond the cell itself.

    Each block with shifted windows looks into the next window, and the block below it sees all of that window.
    """
    return config.window_frames * (config.word_layers // 2)


def pooled_frames(encoder: HierarchicalVisualEncoder, clips: Iterable[Tensor]) -> Tensor:
    """Backbone features [T, P] of a long video, given as uint8 frames [n, H, W, 3] piece by piece: each frame's feature
    depends on that frame alone, so the pieces may be of any length.

    Raises:
        RecipeError: the backbone is a video model.
    """
    if encoder.config.clip_stride:
        raise RecipeError("long_words takes features of single frames; this encoder's backbone reads several at once.")
    with torch.inference_mode():
        return torch.cat([encoder.pooled(frames_NHWC.to(encoder.device)) for frames_NHWC in clips])


@torch.inference_mode()
def long_words(encoder: HierarchicalVisualEncoder, pooled_TP: Tensor, frames_at_once: int) -> Tensor:
    """Word tokens [S, D] of one long clip, as the encoder would give them for all frames at once.

    Args:
        encoder: in eval mode.
        pooled_TP: `pooled_frames` of the clip, or stored frame features.
        frames_at_once: how many frames word level sees in one pass, halo included; bounds the memory.

    Raises:
        RecipeError: an encoder that reads keypoints, so few frames that none would be left between the halos, or more
            than the encoder takes.
    """
    config: Any = encoder.config  # transformers types it as the base class
    if config.pose_layout:
        raise RecipeError(
            "long_words takes features of frames alone; this encoder also reads, or only reads, keypoints."
        )
    grid, halo = grid_frames(config), halo_frames(config)
    before = -(-halo // grid) * grid  # a window begins on the grid
    core = (frames_at_once - before - halo) // grid * grid
    if core < grid or frames_at_once > config.max_frames:
        raise RecipeError(
            f"frames_at_once {frames_at_once}: this encoder needs at least {before + grid + halo} (a cell of {grid} and"
            f" a halo of {halo} frames) and takes at most {config.max_frames} at once."
        )
    centre_D = _centre(encoder, pooled_TP, frames_at_once) if config.centre_clips else None
    words, frames = [], len(pooled_TP)
    for start in range(0, frames, core):
        first, last = max(0, start - before), min(frames, start + core + halo)
        rows_ND = encoder.frame_projection(pooled_TP[first:last].to(encoder.device, encoder.dtype))
        rows_ND = encoder.frame_norm(rows_ND if centre_D is None else rows_ND - centre_D)
        layout = ClipLayout.of([last - first], config.clip_sizes()).to(rows_ND.device)
        words_SD = encoder.word_norm(encoder.word_level(rows_ND, layout))
        stop = min(frames, start + core)
        words.append(words_SD[(start - first) // config.stride : -(-(stop - first) // config.stride)])
    return torch.cat(words)


def _centre(encoder: HierarchicalVisualEncoder, pooled_TP: Tensor, frames_at_once: int) -> Tensor | None:
    """Mean frame feature [D] of the whole clip, in the encoder's precision; None where nothing moves."""
    parts = [part.to(encoder.device, encoder.dtype) for part in pooled_TP.split(frames_at_once)]
    wide = torch.float64 if encoder.dtype == torch.float64 else torch.float32

    def rows_of(part: Tensor) -> Tensor:
        projected: Tensor = encoder.frame_projection(part)
        return projected.to(wide)

    mean_D = torch.stack([rows_of(part).sum(0) for part in parts]).sum(0) / len(pooled_TP)
    whole = sum((rows_of(part).square().sum() for part in parts), start=torch.zeros((), device=mean_D.device))
    moved = sum(
        ((rows_of(part) - mean_D).square().sum() for part in parts), start=torch.zeros((), device=mean_D.device)
    )
    return mean_D.to(encoder.dtype) if bool(moved > STILL_CLIP * whole) else None
