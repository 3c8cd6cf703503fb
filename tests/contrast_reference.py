"""The losses of the contrastive stage as they are defined, with all in memory: what the tiled ones must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.losses.similarity import Tokens


def whole_sentences(video_BE: Tensor, text_BE: Tensor, text_ids_B: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of sentence embeddings."""
    scores_BB = scale * F.normalize(video_BE, dim=-1) @ F.normalize(text_BE, dim=-1).T
    return _info_nce(scores_BB, scores_BB.T, text_ids_B)


def whole_sigmoid(video_BE: Tensor, text_BE: Tensor, text_ids_B: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The sum over pairs of -log sigmoid(z (scale * cosine + bias)) over the number of videos (SigLIP, algorithm 1)."""
    total = torch.zeros((), dtype=video_BE.dtype)
    for i, video_E in enumerate(video_BE):
        for j, text_E in enumerate(text_BE):
            if i != j and text_ids_B[i] == text_ids_B[j]:
                continue
            logit = scale * F.cosine_similarity(video_E, text_E, dim=0) + bias
            total = total - F.logsigmoid(logit if i == j else -logit).sum()
    return total / len(video_BE)


def whole_tokens(words: Tokens, tokens: Tokens, text_ids_B: Tensor, scales: tuple[Tensor, Tensor]) -> Tensor:
    """Symmetric InfoNCE of token similarities, over padded tokens."""
    scale, token_scale = scales
    word_side, token_side = padded_side(words), padded_side(tokens)
    return _info_nce(
        scale * token_similarity(*word_side, *token_side, token_scale),
        scale * token_similarity(*token_side, *word_side, token_scale),
        text_ids_B,
    )


def padded_side(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Normalised [B, K, E], and which of them are real."""
    lengths = list(tokens.lengths)
    features_BKE = pad_sequence(list(F.normalize(tokens.features_NE, dim=-1).split(lengths)), batch_first=True)
    return features_BKE, torch.arange(features_BKE.shape[1]) < torch.tensor(lengths)[:, None]


def token_similarity(
    queries_BKE: Tensor, query_mask_BK: Tensor, keys_NME: Tensor, key_mask_NM: Tensor, token_scale: Tensor
) -> Tensor:
    """Softmax over keys, mean over queries (CiCo, arXiv 2303.12793): [B, N]."""
    similarity_BKNM = (queries_BKE @ keys_NME.flatten(0, 1).T).unflatten(-1, tuple(key_mask_NM.shape))
    lowest = torch.finfo(similarity_BKNM.dtype).min
    weights_BKNM = (token_scale * similarity_BKNM).masked_fill(~key_mask_NM, lowest).softmax(-1)
    best_BKN = (weights_BKNM * similarity_BKNM).masked_fill(~key_mask_NM, 0.0).sum(-1)
    shares_BK = query_mask_BK.to(best_BKN.dtype)
    return torch.einsum("bkn,bk->bn", best_BKN, shares_BK / shares_BK.sum(-1, keepdim=True).clamp(min=1))


def whole_ctc(logits: Tokens, glosses: list[list[int]]) -> Tensor:
    """torch's own loss on one padded batch; the mean over clips with glosses. The blank is class 0."""
    there = [clip for clip, own in enumerate(glosses) if own]
    rows = [logits.features_NE.split(list(logits.lengths))[clip] for clip in there]
    padded_KIV = pad_sequence(rows).log_softmax(-1)
    targets = torch.tensor([gloss for clip in there for gloss in glosses[clip]])
    words, counts = (torch.tensor([len(side[at]) for at in range(len(there))]) for side in (rows, _kept(glosses)))
    return F.ctc_loss(padded_KIV, targets, words, counts, blank=0, reduction="none").mean()


def whole_gloss_set(logits: Tokens, glosses: list[list[int]]) -> Tensor:
    """Cross-entropy of "occurs" for every gloss, which at least one word token must be; clips as in `whole_ctc`."""
    losses = []
    for rows_KV, own in zip(logits.features_NE.softmax(-1).split(list(logits.lengths)), glosses, strict=True):
        if own:
            occurs_V = 1 - (1 - rows_KV).prod(0)
            target_V = torch.tensor([float(gloss in own) for gloss in range(rows_KV.shape[1])]).to(occurs_V.dtype)
            losses.append(F.binary_cross_entropy(occurs_V[1:], target_V[1:], reduction="sum"))
    return torch.stack(losses).mean()


def _kept(glosses: list[list[int]]) -> list[list[int]]:
    return [own for own in glosses if own]


def _info_nce(video_to_text_BB: Tensor, text_to_video_BB: Tensor, text_ids_B: Tensor) -> Tensor:
    target_B = torch.arange(len(text_ids_B))
    blocked_BB = (text_ids_B[:, None] == text_ids_B) & (target_B[:, None] != target_B)
    lowest = torch.finfo(video_to_text_BB.dtype).min
    sides = (side.masked_fill(blocked_BB, lowest) for side in (video_to_text_BB, text_to_video_BB))
    return torch.stack([F.cross_entropy(side_BB, target_B) for side_BB in sides]).sum() / 2
