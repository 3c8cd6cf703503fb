"""The two towers of the contrastive stage: hierarchical visual encoder and projection heads over cached text features.

The text encoder itself is frozen and its outputs are cached, so only its projection heads live here.
Shape suffixes: B samples, N packed frames or text tokens, M packed word tokens, D width, E embedding.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.config.schema import ContrastiveConfig
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.streams import Inputs, frames_of
from pipeline.models.visual import HierarchicalVisualEncoder

SIGMOID_BIAS = -10.0
"""Where SigLIP (arXiv 2303.15343) starts: almost every pair is a negative, and the first steps need not learn that."""


class ContrastiveModel(nn.Module):
    """Video and text into one space, at sentence and at word level.

    Args:
        visual: the encoder to align.
        text_width: width D of the cached text features.
        config: width E of the space, the initial temperature, and which heads there are.
        glosses: classes V of the gloss head, the blank included; 0 = no such head.
    """

    sentence_mean: torch.Tensor
    sentence_scale: torch.Tensor
    tokens_mean: torch.Tensor
    tokens_scale: torch.Tensor

    def __init__(
        self, visual: HierarchicalVisualEncoder, text_width: int, config: ContrastiveConfig, glosses: int = 0
    ) -> None:
        super().__init__()
        width = visual.config.width
        self.visual = visual
        self.sentence_head = nn.Linear(width, config.embed, bias=False)
        self.word_head = nn.Linear(width, config.embed, bias=False)
        self.text_sentence_head = nn.Linear(text_width, config.embed, bias=False)
        self.text_token_head = nn.Linear(text_width, config.embed, bias=False)
        # Set once from the cached features (`set_text_statistics`) and saved with the weights.
        self.register_buffer("sentence_mean", torch.zeros(text_width))
        self.register_buffer("sentence_scale", torch.ones(1))
        self.register_buffer("tokens_mean", torch.zeros(text_width))
        self.register_buffer("tokens_scale", torch.ones(1))
        # 1-d, because ZeRO partitions parameters and a 0-d one cannot be
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / config.initial_temperature)]))
        self.log_token_scale = nn.Parameter(torch.tensor([math.log(1 / config.initial_temperature)]))
        self.learned_numbers = ["log_scale", "log_token_scale"]
        if config.sentence_loss == "sigmoid":
            self.sentence_bias = nn.Parameter(torch.tensor([SIGMOID_BIAS]))
            self.learned_numbers.append("sentence_bias")
        for head in (self.sentence_head, self.word_head, self.text_sentence_head, self.text_token_head):
            nn.init.normal_(head.weight, std=head.in_features**-0.5)
        self.frame_head = nn.Linear(width, config.embed, bias=False) if config.alignment.frame_weight else None
        self.gloss_head = nn.Linear(width, glosses) if glosses else None
        # ZeRO-3 takes parameters of one precision only, and casts none outside the model it has partitioned
        for name, parameter in self.named_parameters():
            if not name.startswith("visual."):
                parameter.data = parameter.data.to(visual.dtype)

    def train(self, mode: bool = True) -> ContrastiveModel:
        """As `nn.Module.train`, but a fully frozen encoder stays in eval mode: no dropout in what never learns."""
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.visual.parameters()):
            self.visual.eval()
        return self

    def set_text_statistics(self, statistics: dict[str, torch.Tensor]) -> None:
        """Centre and scale text features by `TextFeatureCache.statistics`."""
        for name, value in statistics.items():
            getattr(self, name).copy_(value)

    def forward(
        self,
        frames_NHWC: Inputs,
        frame_lengths_B: torch.Tensor | None,
        text_BD: torch.Tensor,
        text_tokens_ND: torch.Tensor,
        layout: ClipLayout | None = None,
        gloss_tokens_ND: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Unnormalised embeddings of both sides, tokens of all samples one after another, and the loss's numbers [1].

        ``pooled_NP``, there if a frozen backbone has read images, can take their place in another forward. With a frame
        head there is ``frames_NE``, with a gloss head ``glosses_MV`` (logits), and with ``gloss_tokens_ND``, features
        of the clips' glosses as texts, ``gloss_tokens_NE``.
        """
        visual = self.visual(frames_NHWC, frame_lengths_B, layout)
        dtype = self.text_sentence_head.weight.dtype
        features = {
            "video_BE": self.sentence_head(visual.sentence_BD),
            "words_ME": self.word_head(visual.words_MD),
            "text_BE": self.text_sentence_head(((text_BD - self.sentence_mean) * self.sentence_scale).to(dtype)),
            "tokens_NE": self._text_tokens(text_tokens_ND),
        }
        if gloss_tokens_ND is not None:
            features["gloss_tokens_NE"] = self._text_tokens(gloss_tokens_ND)
        if self.frame_head is not None:
            features["frames_NE"] = self.frame_head(visual.frames_ND)
        if self.gloss_head is not None:
            features["glosses_MV"] = self.gloss_head(visual.words_MD)
        if not frames_of(frames_NHWC).is_floating_point() and not self.visual.backbone.trains:
            features["pooled_NP"] = visual.pooled_NP
        # multiplied by one so that the values survive ZeRO-3's re-partitioning after the forward
        return features | {name: getattr(self, name) * 1.0 for name in self.learned_numbers}

    def _text_tokens(self, tokens_ND: torch.Tensor) -> torch.Tensor:
        tokens_ND = (tokens_ND - self.tokens_mean) * self.tokens_scale
        features_NE: torch.Tensor = self.text_token_head(tokens_ND.to(self.text_token_head.weight.dtype))
        return features_NE
