"""The connector: a 2-layer GELU MLP from visual tokens to the LLM's embedding width (LLaVA-1.5, arXiv 2310.03744)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

GELU_SECOND_MOMENT = 0.4252
"""E[gelu(z)^2] for z ~ N(0, 1)."""


class ConnectorLinear(nn.Linear):
    """A linear layer that knows the standard deviation of its new weights."""

    def __init__(self, inputs: int, outputs: int, init_std: float) -> None:
        super().__init__(inputs, outputs)
        self.init_std = init_std

    def init_weights(self) -> None:
        """New weights; those that were loaded stay as they are (transformers marks them)."""
        init.normal_(self.weight, std=self.init_std)
        init.zeros_(self.bias)


class Connector(nn.Module):
    """[..., D] visual tokens -> [..., E] LLM embeddings. No output norm, as an embedding table has none.

    New weights are scaled so that inputs of unit RMS (the encoder ends in LayerNorm) come out with ``output_rms``: a
    frozen LLM then sees visual tokens as large as its own embeddings from the first step.
    """

    def __init__(self, width: int, hidden: int, embed: int, output_rms: float) -> None:
        super().__init__()
        self.up = ConnectorLinear(width, hidden, 1.0 / math.sqrt(width))
        self.down = ConnectorLinear(hidden, embed, output_rms / math.sqrt(GELU_SECOND_MOMENT * hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(tokens)))
