"""The decoder's MLPs over a part of the positions at a time, for long sequences (ALST, arXiv 2506.13996).

Its activations are several times wider than the hidden states; computed in chunks and again in backward, those of one
chunk exist at a time. Each chunk is an ordinary checkpoint in the graph, so that every weight still gets its gradient
once per backward, which is what ZeRO waits for.

Shape suffixes: B rows, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.errors import RecipeError
from pipeline.models.language import decoder


def chunk_mlps(llm: PreTrainedModel, chunk_tokens: int) -> list[nn.Module]:
    """Computes the MLP of every decoder layer in chunks of at most ``chunk_tokens`` positions, from now on.

    Whatever replaces an MLP's ``forward`` (fused kernels) must have done so before.

    Returns:
        the MLPs. Ranks with fewer rows compute fewer chunks: under ZeRO-3 each MLP must be gathered as one.

    Raises:
        RecipeError: the layers have no ``mlp`` of their own.
    """
    layers = getattr(decoder(llm), "layers", None)
    mlps: list[Any] = [None]
    if isinstance(layers, nn.ModuleList):
        mlps = [getattr(layer, "mlp", None) for layer in layers]
    if not all(isinstance(mlp, nn.Module) for mlp in mlps):
        raise RecipeError(
            f"continued_pretraining.mlp_chunk_tokens={chunk_tokens}: the layers of {llm.config.model_type!r} have no"
            " part named mlp; set it to 0, or use another LLM"
        )
    for mlp in mlps:
        mlp.forward = _Chunked(mlp.forward, chunk_tokens)
    return mlps


class _Chunked:
    """The forward of an MLP, chunk by chunk."""

    def __init__(self, forward: Callable[[Tensor], Tensor], chunk_tokens: int) -> None:
        self.whole, self.chunk_tokens = forward, chunk_tokens

    def __call__(self, hidden_BLD: Tensor) -> Tensor:
        chunks = hidden_BLD.split(max(self.chunk_tokens // len(hidden_BLD), 1), dim=1)
        if len(chunks) == 1:
            return self.whole(hidden_BLD)
        return torch.cat([self._chunk(chunk) for chunk in chunks], dim=1)

    def _chunk(self, hidden_BLD: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.whole(hidden_BLD)
        result: Tensor = checkpoint(self.whole, hidden_BLD, use_reentrant=False)
        return result
