"""Word level of the visual encoder: attention inside short spans of frames, then strided merging T -> ceil(T / stride).

Everything runs on *packed* rows: the frames of all samples stand one after another with no padding, and attention
stays inside windows, which are spans of these rows. So a sample's output cannot depend on the length of other samples
in the batch. The hierarchy follows the neighbours of LLaVA-SLT (arXiv 2412.16524 does not
publish its shape): GFSLT-VLP reduces T to about T/4, Sign2GPT attends locally.

Legend: N packed rows, M packed word tokens, H heads, C channels per head, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.models.attention import Reach, Spans, ragged_attention
from pipeline.models.clip_layout import ClipLayout

ROPE_BASE = 10_000.0
FEED_FORWARD_RATIO = 4


def rotary(position_N: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [N, 1, channels/2] of rotary positions (RoFormer, arXiv 2104.09864), in float32.

    Rotary angles enter only as differences, so no table bounds the length of a clip.
    """
    exponent = torch.arange(0, channels, 2, device=position_N.device, dtype=torch.float32) / channels
    angle = position_N[:, None].float() * (ROPE_BASE**-exponent)[None, :]
    return angle.cos()[:, None, :], angle.sin()[:, None, :]


def _rotate(rows_NHC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    wide = rows_NHC if rows_NHC.dtype == torch.float64 else rows_NHC.float()
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(rows_NHC.dtype)


class TemporalBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block over packed rows; rows attend inside their span only."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention = "sdpa"
        """Backend of `ragged_attention`."""
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, FEED_FORWARD_RATIO * width)
        self.down = nn.Linear(FEED_FORWARD_RATIO * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows_ND: Tensor, spans: Spans, rope: tuple[Tensor, Tensor]) -> Tensor:
        rows_ND = rows_ND + self.dropout(self._attend(self.attention_norm(rows_ND), spans, rope))
        hidden = F.gelu(self.up(self.feed_forward_norm(rows_ND)))
        return rows_ND + self.dropout(self.down(hidden))

    def _attend(self, rows_ND: Tensor, spans: Spans, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(rows_ND).unflatten(-1, (3, self.heads, -1)).unbind(1)
        mixed = ragged_attention(_rotate(q, rope), _rotate(k, rope), v, Reach(spans, spans), self.attention)
        return self.out(mixed.flatten(1))


class StridedMerge(nn.Module):
    """``stride`` frames -> one word token: mean + linear of the concatenated, normalised frames.

    A short tail keeps its frames in their slots; empty slots are zero after the norm and do not enter the mean, so
    the token of a tail equals what the same frames give in any other batch.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(stride * width, width)

    def forward(self, rows_ND: Tensor, layout: ClipLayout) -> Tensor:
        """Packed frames -> word tokens [M, D]."""
        count_M = layout.merge_counts_M[:, None].to(rows_ND.dtype)
        mean_MD = self._spread(rows_ND, layout).sum(1) / count_M
        return mean_MD + self.project(self._spread(self.norm(rows_ND), layout).flatten(1))

    def _spread(self, rows_ND: Tensor, layout: ClipLayout) -> Tensor:
        """[M, stride, D], zeros in empty slots."""
        slots = len(layout.merge_counts_M) * self.stride
        if len(rows_ND) < slots:
            rows_ND = rows_ND.new_zeros(slots, rows_ND.shape[1]).index_copy(0, layout.merge_slots_N, rows_ND)
        return rows_ND.unflatten(0, (-1, self.stride))


class WordLevel(nn.Module):
    """``layers`` windowed blocks at frame rate, strided merging, and one windowed block at word rate if layers > 1.

    Odd blocks shift their windows by half, so that information crosses window borders (Swin, arXiv 2103.14030). The
    word-rate block spans ``window_frames`` word tokens.
    """

    def __init__(self, config: WordLevelSizes) -> None:
        super().__init__()
        self.channels = config.width // config.heads
        block: Callable[[], TemporalBlock] = lambda: TemporalBlock(config.width, config.heads, config.dropout)  # noqa: E731
        self.frame_blocks = nn.ModuleList(block() for _ in range(config.layers))
        self.merge = StridedMerge(config.width, config.stride)
        self.word_blocks = nn.ModuleList([block()] if config.layers > 1 else [])

    def forward(self, frames_ND: Tensor, layout: ClipLayout) -> Tensor:
        """Packed frames -> packed word tokens [M, D]."""
        rope = rotary(layout.frame_positions_N, self.channels)
        rows = frames_ND
        for number, block in enumerate(self.frame_blocks):
            rows = block(rows, layout.shifted_windows if number % 2 else layout.windows, rope)
        rows = self.merge(rows, layout)
        for block in self.word_blocks:
            rows = block(rows, layout.word_windows, rotary(layout.word_positions_M, self.channels))
        return rows


@dataclass(frozen=True)
class WordLevelSizes:
    """Sizes of `WordLevel`."""

    width: int
    layers: int
    stride: int
    heads: int
    dropout: float
