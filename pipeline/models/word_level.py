"""Word level of the visual encoder: attention inside short spans of frames, then strided merging T -> ceil(T / stride).

Everything runs on *packed* rows: the frames of all samples stand one after another with no padding, and only
attention sees them arranged as ``[groups, slots]`` with an exact mask. So a sample's output cannot depend on the
length of other samples in the batch. The hierarchy follows the neighbours of LLaVA-SLT (arXiv 2412.16524 does not
publish its shape): GFSLT-VLP reduces T to about T/4, Sign2GPT attends locally.

Legend: B samples, N packed rows, G groups, K slots per group, H heads, C channels per head, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

ROPE_BASE = 10_000.0
FEED_FORWARD_RATIO = 4


class Layout(NamedTuple):
    """How packed rows are arranged into groups: windows inside a sample, or one group per sample.

    A named tuple, because ZeRO-3's hooks look for tensors inside tuples and dicts only.

    Attributes:
        slot_N: flat slot (group * slots + slot) of every packed row; distinct.
        valid_GK: which slots hold a row. Every group has at least one.
        full: no slot is empty, so attention needs no mask.
    """

    slot_N: Tensor
    valid_GK: Tensor
    full: bool

    def spread(self, rows_NX: Tensor) -> Tensor:
        """Packed rows [N, ...] -> [G, K, ...], zeros in empty slots."""
        groups, slots = self.valid_GK.shape
        if self.full and rows_NX.shape[0] == groups * slots:
            return rows_NX.view(groups, slots, *rows_NX.shape[1:])
        flat = rows_NX.new_zeros(groups * slots, *rows_NX.shape[1:])
        return flat.index_copy(0, self.slot_N, rows_NX).view(groups, slots, *rows_NX.shape[1:])

    def gather(self, slots_GKX: Tensor) -> Tensor:
        """The inverse of `spread`: [G, K, ...] -> packed rows [N, ...]."""
        flat = slots_GKX.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.slot_N)


def windows(lengths: list[int], size: int, shift: int, device: torch.device | str) -> Layout:
    """Cuts every sample into windows of ``size`` rows, borders at ``shift`` modulo ``size`` from its own first row."""
    length_B = torch.tensor(lengths, dtype=torch.long)
    sample_N, position_N = _enumerate(length_B)
    pad = (size - shift) % size
    groups_B = torch.where(length_B > 0, (length_B - 1 + pad) // size + 1, 0)
    first_group_B = groups_B.cumsum(0) - groups_B
    group_N = first_group_B[sample_N] + (position_N + pad) // size
    slot_N = group_N * size + (position_N + pad) % size
    groups = int(groups_B.sum())
    valid = torch.zeros(groups * size, dtype=torch.bool)
    valid[slot_N] = True
    return Layout(slot_N.to(device), valid.view(groups, size).to(device), full=bool(valid.all()))


def whole_samples(lengths: list[int], device: torch.device | str) -> Layout:
    """One group per sample, as wide as the longest: the padded [B, T] arrangement."""
    length_B = torch.tensor(lengths, dtype=torch.long)
    sample_N, position_N = _enumerate(length_B)
    longest = max(lengths)
    valid = torch.arange(longest)[None, :] < length_B[:, None]
    return Layout((sample_N * longest + position_N).to(device), valid.to(device), full=bool(valid.all()))


def positions(lengths: list[int], device: torch.device | str) -> Tensor:
    """Index of every packed row inside its own sample, int64 [N]."""
    return _enumerate(torch.tensor(lengths, dtype=torch.long))[1].to(device)


def _enumerate(length_B: Tensor) -> tuple[Tensor, Tensor]:
    sample_N = torch.repeat_interleave(torch.arange(len(length_B)), length_B)
    start_B = length_B.cumsum(0) - length_B
    return sample_N, torch.arange(int(length_B.sum())) - start_B[sample_N]


def rotary(position_N: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [N, 1, channels/2] of rotary positions (RoFormer, arXiv 2104.09864), in float32.

    Rotary angles enter only as differences, so no table bounds the length of a clip.
    """
    exponent = torch.arange(0, channels, 2, device=position_N.device, dtype=torch.float32) / channels
    angle = position_N[:, None].float() * (ROPE_BASE**-exponent)[None, :]
    return angle.cos()[:, None, :], angle.sin()[:, None, :]


def _rotate(rows_NHC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = rows_NHC.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(rows_NHC.dtype)


class TemporalBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block over packed rows; rows attend inside their group of the layout only."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, FEED_FORWARD_RATIO * width)
        self.down = nn.Linear(FEED_FORWARD_RATIO * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows_ND: Tensor, layout: Layout, rope: tuple[Tensor, Tensor]) -> Tensor:
        rows_ND = rows_ND + self.dropout(self._attend(self.attention_norm(rows_ND), layout, rope))
        hidden = F.gelu(self.up(self.feed_forward_norm(rows_ND)))
        return rows_ND + self.dropout(self.down(hidden))

    def _attend(self, rows_ND: Tensor, layout: Layout, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(rows_ND).unflatten(-1, (3, self.heads, -1)).unbind(1)
        # spread to [G, K, H, C], then SDPA wants [G, H, K, C]
        q, k, v = (layout.spread(x).transpose(1, 2) for x in (_rotate(q, rope), _rotate(k, rope), v))
        mask = None if layout.full else layout.valid_GK[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(layout.gather(mixed.transpose(1, 2)).flatten(1))


class StridedMerge(nn.Module):
    """``stride`` frames -> one word token: masked mean + linear of the concatenated, normalised frames.

    A short tail keeps its frames in their slots; empty slots are zero after the norm and do not enter the mean, so
    the token of a tail equals what the same frames give in any other batch.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(stride * width, width)

    def forward(self, rows_ND: Tensor, layout: Layout) -> Tensor:
        """Rows and their windows(size=stride) layout -> [G, D], one row per group."""
        count_G = layout.valid_GK.sum(1, keepdim=True).to(rows_ND.dtype)
        mean = layout.spread(rows_ND).sum(1) / count_G
        return mean + self.project(layout.spread(self.norm(rows_ND)).flatten(1))


class WordLevel(nn.Module):
    """``layers`` windowed blocks at frame rate, strided merging, and one windowed block at word rate if layers > 1.

    Odd blocks shift their windows by half, so that information crosses window borders (Swin, arXiv 2103.14030). The
    word-rate block spans ``window_frames`` word tokens.
    """

    def __init__(self, config: WordLevelSizes) -> None:
        super().__init__()
        self.sizes = config
        block: Callable[[], TemporalBlock] = lambda: TemporalBlock(config.width, config.heads, config.dropout)  # noqa: E731
        self.frame_blocks = nn.ModuleList(block() for _ in range(config.layers))
        self.merge = StridedMerge(config.width, config.stride)
        self.word_blocks = nn.ModuleList([block()] if config.layers > 1 else [])

    def forward(self, frames_ND: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """Packed frames and frames per sample -> packed word tokens and words per sample."""
        sizes, device = self.sizes, frames_ND.device
        channels = sizes.width // sizes.heads
        shifts = (0, sizes.window_frames // 2)
        layouts = [windows(lengths, sizes.window_frames, shift, device) for shift in shifts[: sizes.layers]]
        rope = rotary(positions(lengths, device), channels)
        rows = frames_ND
        for number, block in enumerate(self.frame_blocks):
            rows = block(rows, layouts[number % 2], rope)
        rows = self.merge(rows, windows(lengths, sizes.stride, 0, device))
        words = [-(-length // sizes.stride) for length in lengths]
        for block in self.word_blocks:
            layout = windows(words, sizes.window_frames, 0, device)
            rows = block(rows, layout, rotary(positions(words, device), channels))
        return rows, words


@dataclass(frozen=True)
class WordLevelSizes:
    """Sizes of `WordLevel`."""

    width: int
    layers: int
    window_frames: int
    stride: int
    heads: int
    dropout: float


__all__ = [
    "Layout",
    "StridedMerge",
    "TemporalBlock",
    "WordLevel",
    "WordLevelSizes",
    "positions",
    "rotary",
    "whole_samples",
    "windows",
]
