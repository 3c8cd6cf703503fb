"""A causal language model over packed documents.

Shape suffixes: B rows, L positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.losses import Backend, TokenLoss
from pipeline.models.attention import Packed
from pipeline.models.language import decoder, output_head


class PackedCausalLm(nn.Module):
    """A causal LM over packed documents that returns its summed loss; logits exist one chunk at a time."""

    llm: Any

    def __init__(self, llm: nn.Module, loss_chunk_tokens: int, loss_backend: Backend = "torch") -> None:
        super().__init__()
        self.llm = llm
        self.token_loss = TokenLoss(loss_chunk_tokens, loss_backend)

    def forward(
        self, input_ids_BL: torch.Tensor, packed: Packed, targets_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Packs and the token after each (`PackCollate`) -> their summed loss; without targets logits [B, L, V].

        ``packed``: document borders from `pipeline.models.attention.packed_kwargs`.
        """
        hidden_BLD = decoder(self.llm)(input_ids=input_ids_BL, **packed).last_hidden_state
        head = output_head(self.llm)
        if targets_BL is None:
            logits_BLV: torch.Tensor = head(hidden_BLD)
            return logits_BLV
        loss_sum: torch.Tensor = self.token_loss(hidden_BLD.flatten(0, 1), targets_BL.flatten(), head=head)
        return loss_sum

    def matmul_parameters(self, trained: bool = False) -> int:
        """Parameters that multiply every token, or those of them that train; also what ZeRO-3 has partitioned."""
        sizes = {
            name: int(getattr(p, "ds_numel", p.numel()))
            for name, p in self.llm.named_parameters()
            if p.requires_grad or not trained
        }
        tied = bool(getattr(self.llm.config, "tie_word_embeddings", False))
        # the head is a matmul even when it shares the embedding's weights; the look-up itself is not
        return sum(size for name, size in sizes.items() if "embed_tokens" not in name or tied)
