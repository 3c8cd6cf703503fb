"""Sentence-level and token-level contrastive losses.

They are means over this rank's rows, so that averaging gradients over ranks gives the gradient of the single-process
big batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.losses.token import wide


def _identity(tensor: Tensor) -> Tensor:
    return tensor


Gather = Callable[[Tensor], Tensor]
"""[B, ...] of every rank -> [R*B, ...] in rank order, with gradients (``pipeline.dist.gather_with_grad``)."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ragged token features of a batch, padded to the same length on every rank."""

    features_BKE: Tensor
    mask_BK: Tensor
    """True where a token exists; every sample has at least one."""


def clamped_scale(log_scale: Tensor, max_scale: float) -> Tensor:
    """``exp(log_scale)``, at most ``max_scale`` (CLIP, arXiv 2103.00020, uses 100).

    The gradient passes the clamp unchanged, so that a scale that reached the limit can come down again; a plain
    clamp would freeze it there. Linear in the loss gradient, it is also equal at every world size.
    """
    excess = (log_scale - math.log(max_scale)).clamp(min=0).detach()
    return (log_scale - excess).exp()


def sentence_contrastive(
    video_BE: Tensor,
    text_BE: Tensor,
    text_ids_B: Tensor,
    scale: Tensor,
    gather: Gather = _identity,
    rank: int = 0,
    row_chunk: int = 0,
) -> Tensor:
    """Symmetric InfoNCE between sentence embeddings (CLIP, arXiv 2103.00020), local rows against the global batch.

    Args:
        video_BE: sentence embeddings of this rank's videos; normalised here.
        text_BE: embeddings of their texts; normalised here.
        text_ids_B: int64 identity of each text. Other samples with an equal text are not negatives: they are left
            out of the softmax.
        scale: inverse temperature, scalar.
        gather: concatenates over the ranks that share the batch, each with the same B; default a single process.
        rank: this process's place in the gathered batch.
        row_chunk: local rows whose similarities exist at once (recomputed in backward); 0 = all.

    Returns:
        Mean over this rank's rows of both directions; its mean over ranks is the loss of the global batch.

    Raises:
        ValueError: the gathered batch does not fit ``rank`` and B (ranks with different numbers of rows).
    """
    with torch.autocast(video_BE.device.type, enabled=False):
        video_BE, text_BE = (F.normalize(wide(side_BE), dim=-1) for side_BE in (video_BE, text_BE))
        video_NE, text_NE, text_ids_N = gather(video_BE), gather(text_BE), gather(text_ids_B)

        def scores(rows: slice) -> tuple[Tensor, Tensor]:
            return scale * (video_BE[rows] @ text_NE.T), scale * (text_BE[rows] @ video_NE.T)

        return _symmetric_info_nce(scores, text_ids_B, text_ids_N, rank, row_chunk)


def token_contrastive(
    words: Tokens,
    tokens: Tokens,
    text_ids_B: Tensor,
    scales: tuple[Tensor, Tensor | float],
    gather: Gather = _identity,
    rank: int = 0,
    row_chunk: int = 0,
) -> Tensor:
    """Symmetric InfoNCE over fine-grained similarities of word tokens and text tokens (CiCo, arXiv 2303.12793).

    For a pair of video and text, every word token takes the softmax-weighted mean of its cosine similarities to the
    text tokens, and the mean over word tokens is the video-to-text score; text-to-video likewise with the sides
    swapped.

    Args:
        words: word tokens of this rank's videos, [B, S, E]; normalised here.
        tokens: text tokens of their texts, [B, L, E]; normalised here.
        text_ids_B: int64 identity of each text; equal texts are not negatives.
        scales: inverse temperature of the InfoNCE, and of the softmax inside a pair.
        gather: concatenates over the ranks that share the batch, each with the same B, S and L.
        rank: this process's place in the gathered batch.
        row_chunk: local rows whose B x N x S x L similarities exist at once (recomputed in backward); 0 = all.

    Returns:
        Mean over this rank's rows of both directions; its mean over ranks is the loss of the global batch.

    Raises:
        ValueError: the gathered batch does not fit ``rank`` and B (ranks with different numbers of rows).
    """
    scale, token_scale = scales
    with torch.autocast(words.features_BKE.device.type, enabled=False):
        words, tokens = normalised_tokens(words), normalised_tokens(tokens)
        all_words, all_tokens = _gathered(words, gather), _gathered(tokens, gather)

        def scores(rows: slice) -> tuple[Tensor, Tensor]:
            video_to_text_BN = token_similarity(words, rows, all_tokens, token_scale)
            text_to_video_BN = token_similarity(tokens, rows, all_words, token_scale)
            return scale * video_to_text_BN, scale * text_to_video_BN

        return _symmetric_info_nce(scores, text_ids_B, gather(text_ids_B), rank, row_chunk)


def normalised_tokens(tokens: Tokens) -> Tokens:
    """Features of length one, in fp32 (fp64 stays fp64); the mask as bools."""
    return Tokens(F.normalize(wide(tokens.features_BKE), dim=-1), tokens.mask_BK.bool())


def _gathered(tokens: Tokens, gather: Gather) -> Tokens:
    # Not every collective backend moves bools.
    return Tokens(gather(tokens.features_BKE), gather(tokens.mask_BK.to(torch.uint8)).bool())


def token_similarity(queries: Tokens, rows: slice, keys: Tokens, token_scale: Tensor | float) -> Tensor:
    """Fine-grained similarity [rows, N] of K query tokens and M key tokens per pair (CiCo, arXiv 2303.12793): softmax
    over keys, mean over queries. Both sides are `normalised_tokens`; K x N x M numbers per row exist at once.
    """
    queries_BKE, query_mask_BK = queries.features_BKE[rows], queries.mask_BK[rows]
    n_keys, length = keys.mask_BK.shape
    # One matrix product; the layout [B, K, N, M] needs no transposed copy and has the softmax axis last.
    similarity_BKNM = (queries_BKE @ keys.features_BKE.flatten(0, 1).T).unflatten(-1, (n_keys, length))
    hidden_NM = ~keys.mask_BK
    weights_BKNM = (token_scale * similarity_BKNM).masked_fill(hidden_NM, _lowest(similarity_BKNM)).softmax(-1)
    best_BKN = (weights_BKNM * similarity_BKNM).masked_fill(hidden_NM, 0.0).sum(-1)
    query_weights_BK = query_mask_BK.to(best_BKN.dtype)
    query_weights_BK = query_weights_BK / query_weights_BK.sum(-1, keepdim=True).clamp(min=1)
    return torch.einsum("bkn,bk->bn", best_BKN, query_weights_BK)


def _symmetric_info_nce(
    scores: Callable[[slice], tuple[Tensor, Tensor]], text_ids_B: Tensor, text_ids_N: Tensor, rank: int, row_chunk: int
) -> Tensor:
    """Mean over the local rows of the cross-entropies of both score matrices ``scores(rows)`` ([rows, N] each)."""
    n_rows, offset = len(text_ids_B), rank * len(text_ids_B)
    if len(text_ids_N) % n_rows or offset + n_rows > len(text_ids_N):
        raise ValueError(
            f"rank {rank} has {n_rows} rows but the gathered batch has {len(text_ids_N)}: "
            "every rank must bring the same number of rows"
        )

    def loss_sum(rows: slice) -> Tensor:
        targets_B = torch.arange(n_rows, device=text_ids_B.device)[rows] + offset
        equal_text_BN = text_ids_B[rows, None] == text_ids_N[None, :]
        blocked_BN = equal_text_BN & (targets_B[:, None] != torch.arange(len(text_ids_N), device=targets_B.device))
        video_to_text_BN, text_to_video_BN = (
            side_BN.masked_fill(blocked_BN, _lowest(side_BN)) for side_BN in scores(rows)
        )
        return F.cross_entropy(video_to_text_BN, targets_B, reduction="sum") + F.cross_entropy(
            text_to_video_BN, targets_B, reduction="sum"
        )

    if not row_chunk or row_chunk >= n_rows:
        return loss_sum(slice(0, n_rows)) / (2 * n_rows)
    chunks = [
        _maybe_checkpoint(loss_sum, slice(start, min(start + row_chunk, n_rows)))
        for start in range(0, n_rows, row_chunk)
    ]
    return torch.stack(chunks).sum() / (2 * n_rows)


def _lowest(tensor: Tensor) -> float:
    """Stands for minus infinity, without NaN if a whole row is masked."""
    return torch.finfo(tensor.dtype).min


def _maybe_checkpoint(function: Callable[..., Tensor], *args: object) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*args)
    # No randomness inside: saving the RNG state would only cost a device synchronisation per chunk.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
