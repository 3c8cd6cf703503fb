"""The loss of the contrastive stage over this rank's share of the global batch.

Negatives are the whole global batch, for any number of ranks and micro-batches: local loss with
gather-with-grad, cached-gradient accumulation (GradCache, arXiv 2101.06983).

Shape suffixes: B samples, S word tokens, L text tokens, E embedding.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from pipeline import dist
from pipeline.config.schema import ContrastiveConfig
from pipeline.losses import Tokens, clamped_scale, sentence_contrastive, token_contrastive
from pipeline.stages.base import LossParts
from pipeline.stages.held_out_retrieval import SENTENCE, TOKEN, TRAINED


def contrastive_loss(
    features: list[dict[str, torch.Tensor]], text_ids_B: torch.Tensor, config: ContrastiveConfig, rank: int
) -> LossParts:
    """The loss of the recipe's objective. All ranks must call.

    Args:
        features: of every micro-batch of this rank, from `ContrastiveModel` with the text's ``tokens_mask_BL``.
        text_ids_B: of all micro-batches together; equal texts are not negatives of each other.
        config: objective, weights and the largest logit scale.
        rank: this rank.
    """
    scale = clamped_scale(features[0]["log_scale"].float(), config.max_logit_scale)
    token_scale = clamped_scale(features[0]["log_token_scale"].float(), config.max_logit_scale)
    device, count = scale.device, len(text_ids_B)
    total = torch.zeros((), device=device)
    sums = {"samples": torch.tensor(float(count), device=device)}
    if SENTENCE in TRAINED[config.objective]:
        video_BE, text_BE = (torch.cat([f[name].float() for f in features]) for name in ("video_BE", "text_BE"))
        sentence = sentence_contrastive(
            video_BE, text_BE, text_ids_B, scale, dist.gather, rank=rank, row_chunk=config.row_chunk
        )
        total = total + sentence
        sums["sentence_loss"] = sentence.detach() * count
    if TOKEN in TRAINED[config.objective]:
        words, tokens = _padded(features)
        token = token_contrastive(
            words, tokens, text_ids_B, (scale, token_scale), dist.gather, rank=rank, row_chunk=config.row_chunk
        )
        total = total + token * (config.token_weight if config.objective == "both" else 1.0)
        sums["token_loss"] = token.detach() * count
    sums["loss"] = total.detach() * count
    sums["logit_scale"] = scale.detach().sum() * count
    return LossParts(total, sums)


def _padded(features: list[dict[str, torch.Tensor]]) -> tuple[Tokens, Tokens]:
    """Word and text tokens of all micro-batches, padded to the longest of all ranks (gathering needs it)."""
    sizes = torch.tensor(
        [max(f["words_BSE"].shape[1] for f in features), max(f["tokens_BLE"].shape[1] for f in features)],
        device=features[0]["words_BSE"].device,
    )
    longest_S, longest_L = dist.all_reduce_max(sizes).tolist()

    def join(values: str, mask: str, length: int) -> Tokens:
        return Tokens(
            torch.cat([functional.pad(f[values].float(), (0, 0, 0, length - f[values].shape[1])) for f in features]),
            torch.cat([functional.pad(f[mask], (0, length - f[mask].shape[1])) for f in features]),
        )

    return join("words_BSE", "words_mask_BS", longest_S), join("tokens_BLE", "tokens_mask_BL", longest_L)
