"""Held-out retrieval of the contrastive stage by the similarities that its objective trains; untrained heads are not
used.

Shape suffixes: B samples of a batch, N all samples, S word tokens, L text tokens, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import ContrastiveConfig
from pipeline.evaluate.retrieval import ScoreRows, cosine_scores, flat_metrics, retrieval_from_scores
from pipeline.losses import Tile, Tokens, normalised, one_way_similarity, padded

SENTENCE, TOKEN = "sentence", "token"
TRAINED = {"sentence": (SENTENCE,), "token": (TOKEN,), "both": (SENTENCE, TOKEN)}
"""Similarities that have a loss, per objective."""
MAX_SIMILARITIES = 1 << 24
"""Token similarities in memory at once."""

Scores = tuple[ScoreRows, ScoreRows]
"""Video to text, text to video."""


@dataclass(frozen=True, slots=True)
class HeldOutPair:
    """A held-out sample on the CPU, in the precision the model computed in."""

    text_id: int
    sides: dict[str, tuple[Tensor, Tensor]]
    """The video's and the text's embeddings per trained similarity: [E] each for `sentence`, the real tokens [S, E] and
    [L, E] for `token`."""


def pairs_of(features: dict[str, Tensor], batch: Mapping[str, Any], config: ContrastiveConfig) -> list[HeldOutPair]:
    """The samples of a micro-batch, from its features."""
    sides: dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]] = {
        SENTENCE: (_on_cpu(features["video_BE"]).unbind(), _on_cpu(features["text_BE"]).unbind()),
        TOKEN: (
            _on_cpu(features["words_ME"]).split(batch["word_lengths"]),
            _on_cpu(features["tokens_NE"]).split(batch["token_lengths"]),
        ),
    }
    return [
        HeldOutPair(text_id, {name: (sides[name][0][at], sides[name][1][at]) for name in TRAINED[config.objective]})
        for at, text_id in enumerate(batch["text_ids_B"].tolist())
    ]


def _on_cpu(features: Tensor) -> Tensor:
    return features.detach().cpu()


def held_out_metrics(
    pairs: Sequence[HeldOutPair], config: ContrastiveConfig, token_scale: float, device: torch.device
) -> dict[str, float]:
    """Retrieval metrics (`flat_metrics`) of the objective, and of each trained similarity under its own name.

    ``video_to_text/r1`` orders candidates as the objective does: by the cosine of sentence embeddings (`sentence`), by
    token similarity (`token`), by their sum with the weights of the loss (`both`). ``sentence/video_to_text/r1`` and
    ``token/video_to_text/r1`` order by one of them.

    Args:
        pairs: all held-out samples, from `pairs_of` with the same config.
        config: objective and token weight.
        token_scale: the trained inverse temperature of the softmax inside a pair.
        device: where token similarities are computed.

    Raises:
        DataError: no pairs.
        DivergedError: similarities that are not finite.
    """
    text_ids_N = np.array([pair.text_id for pair in pairs])
    scores: dict[str, Scores] = {}
    for name in TRAINED[config.objective]:
        video, text = ([pair.sides[name][side] for pair in pairs] for side in (0, 1))
        scores[name] = (
            cosine_scores(*(torch.stack(side).float().numpy() for side in (video, text)))
            if name == SENTENCE
            else _token_scores(_whole(video, device), _whole(text, device), torch.tensor(token_scale, device=device))
        )
    metrics = {name: flat_metrics(retrieval_from_scores(*scores[name], text_ids_N)) for name in scores}
    objective_metrics = metrics[next(iter(metrics))]
    if len(metrics) > 1:
        objective_metrics = flat_metrics(retrieval_from_scores(*_sum(scores, config.token_weight), text_ids_N))
    return objective_metrics | {
        f"{kind}/{name}": value for kind, values in metrics.items() for name, value in values.items()
    }


def _sum(scores: dict[str, Scores], token_weight: float) -> Scores:
    """The logits of both losses have one scale, so they add up as the losses do."""

    def direction(number: int) -> ScoreRows:
        sentence, token = scores[SENTENCE][number], scores[TOKEN][number]
        return lambda rows: sentence(rows) + token_weight * token(rows)

    return direction(0), direction(1)


def _whole(tokens: list[Tensor], device: torch.device) -> Tile:
    """The tokens of all samples, padded to the longest."""
    lengths = [len(rows) for rows in tokens]
    every = slice(0, len(lengths))
    packed = Tokens(normalised(torch.cat(tokens).to(device)), lengths)
    (features_NKE,) = padded(packed, range(len(lengths)), [every], [max(lengths)])
    return Tile(features_NKE, torch.tensor([lengths, lengths], device=device).T)


def _part(tile: Tile, rows: slice) -> Tile:
    return Tile(tile.features[rows], tile.facts_I2[rows])


def _token_scores(words: Tile, tokens: Tile, token_scale: Tensor) -> Scores:
    def direction(queries: Tile, keys: Tile) -> ScoreRows:
        step = max(1, MAX_SIMILARITIES // (queries.features.shape[1] * keys.features[..., 0].numel()))

        def scores(rows: slice) -> np.ndarray:
            slices = [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
            parts = [one_way_similarity(_part(queries, part), keys, token_scale).cpu() for part in slices]
            return torch.cat(parts).numpy()

        return scores

    return direction(words, tokens), direction(tokens, words)
