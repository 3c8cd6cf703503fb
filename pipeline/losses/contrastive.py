"""The contrastive objectives: sentence embeddings, or tokens, of this rank's samples against the global batch.

Each is a mean over this rank's samples, so that averaging gradients over ranks gives the gradient of one process that
holds the whole batch.

Legend: B samples of this rank, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline import dist
from pipeline.losses.criteria import Sigmoid, Softmax
from pipeline.losses.similarity import Tokens, normalised, padded, sentence_similarity, token_similarity
from pipeline.losses.tiles import Criterion, Group, Numbers, Pairs, Side, Tile, cut, tiled_loss

TILE_NUMBERS = 1 << 20
"""Similarities of a tile where the caller does not say."""


def clamped_scale(log_scale: Tensor, max_scale: float) -> Tensor:
    """``exp(log_scale)``, at most ``max_scale`` (CLIP, arXiv 2103.00020, uses 100).

    The gradient passes the clamp unchanged, so that a scale that reached the limit can come down again; a plain
    clamp would freeze it there. Linear in the loss gradient, it is also equal at every world size.
    """
    excess = (log_scale - math.log(max_scale)).clamp(min=0).detach()
    return (log_scale - excess).exp()


def sentence_contrastive(
    sides: tuple[Tensor, Tensor],
    text_ids_B: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    group: Group = dist,
    tile_numbers: int = TILE_NUMBERS,
) -> Tensor:
    """Contrastive loss between sentence embeddings. All ranks must call, with the same B.

    Args:
        sides: embeddings of this rank's videos and of their texts, [B, E] each; normalised here.
        text_ids_B: int64 identity of each text. Other samples with an equal text are no negatives: they are left out.
        scale: inverse temperature, [] or [1].
        bias: [] or [1]: the sigmoid loss per pair (SigLIP, arXiv 2303.15343) with this bias. None: symmetric InfoNCE
            (CLIP, arXiv 2103.00020).
        group: the ranks that share the batch.
        tile_numbers: similarities in memory at once.

    Returns:
        Scalar; its mean over ranks is the loss of the global batch.
    """
    samples = len(text_ids_B)
    with torch.autocast(text_ids_B.device.type, enabled=False):
        video_BE, text_BE = (normalised(side_BE) for side_BE in sides)
        columns = cut([1] * samples, math.isqrt(tile_numbers) // group.world_size())
        rows = cut([1] * samples, tile_numbers // (_most(columns) * group.world_size()))
        facts_B2 = _facts(text_ids_B, range(samples), [1] * samples)
        videos, texts = (
            Side([Tile(side_BE[part], facts_B2[part]) for part in parts], range(samples))
            for side_BE, parts in ((video_BE, rows), (text_BE, columns))
        )
        criterion: Criterion = Softmax(samples) if bias is None else Sigmoid(samples)
        numbers = Numbers(scale, torch.zeros_like(scale), bias)
        return tiled_loss(Pairs(videos, texts, sentence_similarity, group), criterion, numbers)


def token_contrastive(
    words: Tokens,
    tokens: Tokens,
    text_ids_B: Tensor,
    scales: tuple[Tensor, Tensor],
    group: Group = dist,
    tile_numbers: int = TILE_NUMBERS,
) -> Tensor:
    """Symmetric InfoNCE over the similarities of word tokens and text tokens (`token_similarity`). All ranks must call,
    with the same B.

    Samples are sorted by length on both sides, so that a tile pads to lengths close to its own; the lengths of texts
    are agreed between hosts.

    Args:
        words: word tokens of this rank's videos; normalised here.
        tokens: text tokens of their texts; normalised here.
        text_ids_B: int64 identity of each text; equal texts are no negatives.
        scales: inverse temperature of the InfoNCE, and of the softmax inside a pair; [] or [1] each.
        group: the ranks that share the batch.
        tile_numbers: similarities in memory at once (of tokens, padding included).

    Returns:
        Scalar; its mean over ranks is the loss of the global batch.
    """
    samples, ranks = len(text_ids_B), group.world_size()
    with torch.autocast(text_ids_B.device.type, enabled=False):
        of_words, of_tokens = (sorted(range(samples), key=side.lengths.__getitem__) for side in (words, tokens))
        word_lengths = [words.lengths[sample] for sample in of_words]
        of_ranks = group.host_counts([tokens.lengths[sample] for sample in of_tokens])
        token_lengths = [max(lengths) for lengths in zip(*of_ranks, strict=True)]
        columns = cut(token_lengths, math.isqrt(tile_numbers) // ranks)
        longest = [_longest(token_lengths, part) for part in columns]
        widest = max(length * (part.stop - part.start) for length, part in zip(longest, columns, strict=True)) * ranks
        rows = cut(word_lengths, tile_numbers // widest)
        pairs = Pairs(
            _tiles(words, of_words, rows, [_longest(word_lengths, part) for part in rows], text_ids_B),
            _tiles(tokens, of_tokens, columns, longest, text_ids_B),
            token_similarity,
            group,
        )
        return tiled_loss(pairs, Softmax(samples), Numbers(*scales))


def _tiles(tokens: Tokens, order: list[int], parts: list[slice], longest: list[int], text_ids_B: Tensor) -> Side:
    facts_B2 = _facts(text_ids_B, order, tokens.lengths)
    features = padded(Tokens(normalised(tokens.features_NE), tokens.lengths), order, parts, longest)
    return Side([Tile(tile, facts_B2[part]) for tile, part in zip(features, parts, strict=True)], order)


def _facts(text_ids_B: Tensor, order: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """`Tile.facts_I2` of all samples in this order. Lengths come from the host, for which no device waits."""
    table_2B = torch.tensor([list(order), [lengths[sample] for sample in order]])
    order_B, lengths_B = table_2B.to(text_ids_B.device, non_blocking=True)
    return torch.stack((text_ids_B[order_B], lengths_B), 1)


def _most(parts: list[slice]) -> int:
    return max(part.stop - part.start for part in parts)


def _longest(lengths: list[int], part: slice) -> int:
    return max(1, *lengths[part])
