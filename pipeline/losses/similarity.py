"""How well videos and texts of a tile fit: by their sentence embeddings, or by their tokens.

Legend: I videos and J texts of a tile, K tokens of a query, L tokens of a key, S word tokens, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses.precision import wide
from pipeline.losses.tiles import Scores, Tile


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token features of some samples, one sample after another."""

    features_NE: Tensor
    lengths: Sequence[int]
    """Tokens of each sample; they sum to N."""


def normalised(features: Tensor) -> Tensor:
    """Features of length one, in fp32 (fp64 stays fp64)."""
    return F.normalize(wide(features), dim=-1)


def padded(tokens: Tokens, order: Sequence[int], slices: Sequence[slice], longest: Sequence[int]) -> list[Tensor]:
    """Tokens of neighbouring samples as [samples, longest, E] per slice, zeros after their last one.

    Args:
        tokens: what is padded.
        order: the samples' numbers as the slices count them.
        slices: which neighbours stand together.
        longest: what each slice is padded to, at least its longest sample.
    """
    lengths_B = torch.tensor(tokens.lengths)
    table_2B = torch.stack((lengths_B.cumsum(0) - lengths_B, lengths_B))[:, torch.tensor(order)]
    table_2B = table_2B.to(tokens.features_NE.device, non_blocking=True)
    last = len(tokens.features_NE) - 1
    tiles = []
    for part, length in zip(slices, longest, strict=True):
        starts_I, lengths_I = table_2B[:, part]
        at_K = torch.arange(length, device=table_2B.device)
        # what stands for padding differs from sample to sample, or the backward would add all of it to one row
        rows_IK = (starts_I[:, None] + at_K.minimum((lengths_I[:, None] - 1).clamp(min=0))).clamp(max=last)
        real_IK1 = (at_K < lengths_I[:, None])[..., None]
        tiles.append(tokens.features_NE[rows_IK] * real_IK1.to(tokens.features_NE.dtype))
    return tiles


def sentence_similarity(videos: Tile, texts: Tile, token_scale: Tensor) -> Scores:
    """The cosines of normalised embeddings."""
    del token_scale
    return (videos.features @ texts.features.T,)


def token_similarity(words: Tile, tokens: Tile, token_scale: Tensor) -> Scores:
    """Fine-grained similarity of normalised tokens, in both directions (CiCo, arXiv 2303.12793); every sample has at
    least one token.

    Video to text: every word token takes the softmax-weighted mean of its cosines to the text's tokens; the mean over
    word tokens. Text to video likewise, with the sides swapped.
    """
    # one product for both directions, and no transposed copy of it
    cosines_ISJL = _cosines(words, tokens)
    best_ISJ, best_IJL = (_Best.apply(cosines_ISJL, token_scale, dim) for dim in (3, 1))
    of_videos_IJ = torch.einsum("isj,is->ij", best_ISJ, _shares(words))
    return of_videos_IJ, torch.einsum("ijl,jl->ij", best_IJL, _shares(tokens))


def one_way_similarity(queries: Tile, keys: Tile, token_scale: Tensor) -> Tensor:
    """How well every query's tokens are found in every key's, [I, J]: one direction of `token_similarity`."""
    best_IKJ = _Best.apply(_cosines(queries, keys), token_scale, 3)
    return torch.einsum("ikj,ik->ij", best_IKJ, _shares(queries))


def _cosines(queries: Tile, keys: Tile) -> Tensor:
    """[I, K, J, L]; `_PADDING` where one of the two is padding."""
    # Two more channels subtract it: the product does what would take two more passes over its result.
    queries_IKE = _with_channels(queries, 0)
    keys_JLE = _with_channels(keys, 1)
    return (queries_IKE.flatten(0, 1) @ keys_JLE.flatten(0, 1).T).view(*queries_IKE.shape[:2], *keys_JLE.shape[:2])


_PADDING = -1e6
"""Far below every cosine: no softmax of ours gives it a weight above zero."""


def _with_channels(tile: Tile, own: int) -> Tensor:
    """The features with two channels more: ``own`` holds `_PADDING` on padding, the other one ones."""
    channels_IK2 = tile.features.new_ones(*tile.features.shape[:2], 2)
    channels_IK2[..., own] = (~_real(tile)) * _PADDING
    return torch.cat((tile.features, channels_IK2), -1)


def _real(tile: Tile) -> Tensor:
    return torch.arange(tile.features.shape[1], device=tile.features.device) < tile.lengths_I[:, None]


def _shares(tile: Tile) -> Tensor:
    """The weight of every token in the mean over its sample's."""
    return _real(tile).to(tile.features.dtype) / tile.lengths_I[:, None].clamp(min=1)


class _Best(torch.autograd.Function):
    """The softmax-weighted mean of cosines over one axis. Its derivative by a cosine is its weight times one plus the
    scaled distance from the mean; by the scale, the weighted variance."""

    @staticmethod
    def forward(ctx: Any, cosines: Tensor, token_scale: Tensor, dim: int) -> Tensor:
        weights = (token_scale * cosines).softmax(dim)
        best = (weights * cosines).sum(dim)
        ctx.dim = dim
        ctx.save_for_backward(cosines, token_scale, weights, best)
        return best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cosines, token_scale, weights, best = ctx.saved_tensors
        distance = cosines - best.unsqueeze(ctx.dim)
        outward = weights * grads[0].unsqueeze(ctx.dim)
        slope = outward * distance
        of_scale = torch.dot(slope.flatten(), distance.flatten()).expand_as(token_scale)
        return torch.addcmul(outward, slope, token_scale), of_scale, None
