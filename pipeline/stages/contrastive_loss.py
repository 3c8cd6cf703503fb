"""The loss of the contrastive stage over this rank's share of the global batch.

Negatives are the whole global batch, for any number of ranks and micro-batches: tiles of all pairs, cached-gradient
accumulation (GradCache, arXiv 2101.06983).

Shape suffixes: B samples, M packed word tokens, N packed text tokens, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline import dist
from pipeline.config.schema import TILE_MIB, ContrastiveConfig
from pipeline.losses import Tokens, clamped_scale, sentence_contrastive, token_contrastive
from pipeline.losses.gloss import GlossCriterion, Glosses, ctc, ctc_in_order_of_video, gloss_loss, gloss_set
from pipeline.losses.precision import wide
from pipeline.stages.base import LossParts, Normaliser
from pipeline.stages.held_out_retrieval import SENTENCE, TOKEN, TRAINED

Features = dict[str, torch.Tensor]
LOSSES = (SENTENCE, TOKEN, "frame", "segment", "ctc", "set")
"""Names of what the loss is the weighted sum of, as far as the recipe asks for it."""


def tile_mib(config: ContrastiveConfig, device: torch.device) -> int:
    """MiB of similarities that exist at once."""
    return config.tile_mib or TILE_MIB[device.type]


def contrastive_loss(
    features: list[Features], batches: list[Any], config: ContrastiveConfig, normaliser: Normaliser
) -> LossParts:
    """The loss of the recipe's objective. All ranks must call.

    Args:
        features: of every micro-batch of this rank, from `ContrastiveModel`.
        batches: the micro-batches themselves, `ContrastiveBatch`; equal texts are not negatives of each other.
        config: objective, weights and the largest logit scale.
        normaliser: the samples of the global batch, and the step.

    Raises:
        ValueError: the ranks do not bring equally many samples.
    """
    scale, token_scale = (
        clamped_scale(wide(features[0][name]), config.max_logit_scale) for name in ("log_scale", "log_token_scale")
    )
    text_ids_B = torch.cat([batch["text_ids_B"] for batch in batches])
    count = len(text_ids_B)
    if count * normaliser.world_size != normaliser.valid_tokens:
        raise ValueError(
            f"this rank has {count} of the {normaliser.valid_tokens} samples of {normaliser.world_size} ranks: "
            "every rank must bring the same number"
        )
    tiles = tile_mib(config, scale.device) * 2**20 // 4
    losses: dict[str, torch.Tensor] = {}
    if SENTENCE in TRAINED[config.objective]:
        video_BE, text_BE = (torch.cat([f[name] for f in features]) for name in ("video_BE", "text_BE"))
        bias = wide(features[0]["sentence_bias"]) if config.sentence_loss == "sigmoid" else None
        losses[SENTENCE] = sentence_contrastive((video_BE, text_BE), text_ids_B, scale, bias, dist, tiles)
    if TOKEN in TRAINED[config.objective]:
        words = _joined(features, batches, "words_ME", "word_lengths")
        tokens = _joined(features, batches, "tokens_NE", "token_lengths")
        losses[TOKEN] = token_contrastive(words, tokens, text_ids_B, (scale, token_scale), dist, tiles)
    weights = {SENTENCE: 1.0, TOKEN: config.token_weight if len(losses) > 1 else 1.0}
    losses |= _alignment(features, batches, config, (scale, token_scale))
    sums: dict[str, torch.Tensor] = {}
    if config.ctc.used:
        lengths = [length for batch in batches for length in batch["gloss_lengths"]]
        losses |= _glosses(features, batches, config, lengths)
        sums["gloss_left_out"] = torch.full_like(scale.detach().sum(), lengths.count(0))
    weights |= {"frame": config.alignment.frame_weight, "segment": config.alignment.segment_weight}
    started = normaliser.step >= config.ctc.start_step
    weights |= {"ctc": config.ctc.weight if started else 0.0, "set": config.ctc.set_weight}
    total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
    sums |= {f"{name}_loss": loss.detach() * count for name, loss in losses.items()}
    sums |= {"loss": total.detach() * count, "logit_scale": scale.detach().sum() * count}
    return LossParts(total, sums | {"samples": torch.full_like(total.detach(), count)})


def _alignment(
    features: list[Features], batches: list[Any], config: ContrastiveConfig, scales: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Frames and word tokens against the tokens of the clip's glosses, those of all other clips being negatives.

    Alignment below the sentence as in arXiv 2507.06732, whose third level is the objective's sentence loss. Ours: the
    loss (`token_contrastive`, with the objective's scales), word tokens as segments, and glosses as one text.
    """
    losses = {}
    sides = {"frame": ("frames_NE", "frame_lengths"), "segment": ("words_ME", "word_lengths")}
    for name, side in sides.items():
        if getattr(config.alignment, f"{name}_weight"):
            rows = _joined(features, batches, *side)
            glosses = _joined(features, batches, "gloss_tokens_NE", "gloss_token_lengths")
            ids_B = torch.cat([batch["gloss_ids_B"] for batch in batches])
            tiles = tile_mib(config, ids_B.device) * 2**20 // 4
            losses[name] = token_contrastive(rows, glosses, ids_B, scales, dist, tiles)
    return losses


def _glosses(
    features: list[Features], batches: list[Any], config: ContrastiveConfig, lengths: list[int]
) -> dict[str, torch.Tensor]:
    """CTC and the gloss set of the gloss head's logits."""
    criteria: dict[str, tuple[float, GlossCriterion]] = {
        "ctc": (config.ctc.weight, ctc_in_order_of_video if config.ctc.order == "video" else ctc),
        "set": (config.ctc.set_weight, gloss_set),
    }
    logits = _joined(features, batches, "glosses_MV", "word_lengths")
    glosses = Glosses(torch.cat([batch["gloss_classes_N"] for batch in batches]), lengths)
    tiles = tile_mib(config, logits.features_NE.device) * 2**20 // 4
    return {
        name: gloss_loss(logits, glosses, criterion, dist, tiles)
        for name, (weight, criterion) in criteria.items()
        if weight
    }


def _joined(features: list[Features], batches: list[Mapping[str, Any]], tokens: str, lengths: str) -> Tokens:
    """Tokens of all micro-batches; their lengths are the loader's, so that no device is asked for them."""
    return Tokens(torch.cat([f[tokens] for f in features]), [length for batch in batches for length in batch[lengths]])
