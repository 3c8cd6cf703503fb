"""Training objectives: chunked token cross-entropy, sentence-level and token-level contrastive losses.

All of them return *sums or local means* that become exact global values after the caller's normalisation: the
cross-entropy is a sum over this rank's labelled tokens, the contrastive losses are means over this rank's rows, so
that averaging gradients over ranks gives the gradient of the single-process big batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_LABEL = -100
"""Label of positions that carry no loss (the Hugging Face convention)."""


# --- next-token cross-entropy -----------------------------------------------------------------------------------


def label_chunks(labels_BL: Tensor, chunk_tokens: int) -> int:
    """Chunks that `token_cross_entropy` runs for these labels; at least 1. All-reduce (max) it under ZeRO-3."""
    return max(1, math.ceil(int((labels_BL[:, 1:] != IGNORE_LABEL).sum()) / chunk_tokens))


def token_cross_entropy(
    hidden_BLD: Tensor, lm_head: nn.Module, labels_BL: Tensor, chunk_tokens: int = 1024, min_chunks: int = 0
) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy summed over labelled positions, with logits of one chunk in memory at a time.

    Labels are shifted by one here. Only the hidden states of labelled positions go through ``lm_head``, which is
    exact and makes the head as cheap as the answer is short.

    Args:
        hidden_BLD: last hidden states.
        lm_head: module from hidden states to logits (with any soft-cap the model applies to them). It is *called*,
            never read for its weight, so that ZeRO-3 hooks gather the weight around each chunk.
        labels_BL: target ids, `IGNORE_LABEL` where there is no loss.
        chunk_tokens: labelled positions whose logits exist at once.
        min_chunks: run at least this many chunks, the missing ones with zero weight. Under ZeRO-3 every call of
            ``lm_head`` is a collective, so ranks with different amounts of labels must agree on the count
            (`label_chunks`, all-reduced with max).

    Returns:
        The loss sum (fp32, or fp64 for fp64 input) and the number of labelled positions (int64), both scalars.
        Without any labelled position the sum is 0.0 and still connected to the graph: every rank can run backward.
    """
    targets_BL = labels_BL[:, 1:]
    wanted_BL = targets_BL != IGNORE_LABEL
    states_ND = hidden_BLD[:, :-1][wanted_BL]
    targets_N = targets_BL[wanted_BL]
    states = list(states_ND.split(chunk_tokens)) if len(states_ND) else []
    targets = list(targets_N.split(chunk_tokens)) if len(states_ND) else []
    losses = [
        _maybe_checkpoint(_chunk_loss, lm_head, states_CD, targets_C)
        for states_CD, targets_C in zip(states, targets, strict=True)
    ]
    for _ in range(max(1, min_chunks) - len(losses)):
        losses.append(_maybe_checkpoint(_zero_loss, lm_head, hidden_BLD[:1, :1].flatten(0, 1)))
    return torch.stack(losses).sum(), wanted_BL.sum()


def _chunk_loss(lm_head: nn.Module, states_CD: Tensor, targets_C: Tensor) -> Tensor:
    return F.cross_entropy(_wide(lm_head(states_CD)), targets_C, reduction="sum")


def _zero_loss(lm_head: nn.Module, states_CD: Tensor) -> Tensor:
    return _wide(lm_head(states_CD)).sum() * 0.0


def _maybe_checkpoint(function: Callable[..., Tensor], *args: object) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*args)
    # No randomness inside: saving the RNG state would only cost a device synchronisation per chunk.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _wide(tensor: Tensor) -> Tensor:
    """fp32 unless the caller works in fp64: sums over a vocabulary or a batch are not for bf16."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# --- contrastive ------------------------------------------------------------------------------------------------


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
        video_BE, text_BE = (F.normalize(_wide(side_BE), dim=-1) for side_BE in (video_BE, text_BE))
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
    return Tokens(F.normalize(_wide(tokens.features_BKE), dim=-1), tokens.mask_BK.bool())


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
