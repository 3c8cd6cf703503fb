"""Losses of gloss logits at word tokens against the glosses of a clip: in their order (CTC), or as a set.

Both are sums over clips, so that any cut of the global batch into ranks and micro-batches gives the same mean. One
tile of clips is in memory at a time, with its gradient, as `pipeline.losses.token` does it for tokens.

Legend: B clips of this rank, M packed word tokens, V classes (0 is the blank), N packed glosses; I clips of a tile, K
and L their most word tokens and glosses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import dist
from pipeline.losses.precision import wide
from pipeline.losses.similarity import Tokens
from pipeline.losses.tiles import Group, cut

BLANK = 0
"""Class of a word token that shows no gloss, or that its neighbour's gloss goes on."""
TILE_NUMBERS = 1 << 20
"""Logits of a tile where the caller does not say."""


@dataclass(frozen=True, slots=True)
class Glosses:
    """What some clips show, one clip after another."""

    classes_N: Tensor
    """int64, 1 to V - 1."""
    lengths: Sequence[int]
    """Glosses of each clip; a clip with 0 is left out. They sum to N."""


@dataclass(frozen=True, slots=True)
class GlossTile:
    """Some clips that have glosses."""

    log_probs_IKV: Tensor
    words_I: Tensor
    """Word tokens of each, int64 [I], on the host: what stands behind them has no meaning."""
    classes_IL: Tensor
    """Behind a clip's last gloss: the blank."""
    glosses_I: Tensor
    """Glosses of each, int64 [I], on the host."""

    def real_IK(self) -> Tensor:
        """Which word tokens there are."""
        device = self.log_probs_IKV.device
        return (
            torch.arange(self.log_probs_IKV.shape[1], device=device)
            < self.words_I.to(device, non_blocking=True)[:, None]
        )


GlossCriterion = Callable[[GlossTile], Tensor]
"""The loss of a tile: a sum over its clips, a scalar."""


def gloss_loss(
    logits: Tokens, glosses: Glosses, criterion: GlossCriterion, group: Group = dist, tile_numbers: int = TILE_NUMBERS
) -> Tensor:
    """Mean loss of the clips of the global batch that have glosses. All ranks must call; B may differ.

    Args:
        logits: of this rank's word tokens, [M, V].
        glosses: of its clips.
        criterion: `ctc`, `ctc_in_order_of_video` or `gloss_set`.
        group: the ranks that share the batch.
        tile_numbers: logits in fp32 at once.

    Returns:
        Scalar; its mean over ranks is the mean over clips. 0.0, and connected to the graph, if no clip has glosses.
    """
    here = [clip for clip, length in enumerate(glosses.lengths) if length]
    clips = sum(count for (count,) in group.host_counts([len(here)]))
    tiles = _cut_tiles(logits, glosses, here, tile_numbers)
    with torch.autocast(logits.features_NE.device.type, enabled=False):
        loss: Tensor = _GlossLoss.apply(logits.features_NE, glosses.classes_N, tiles, criterion)
    return loss * (group.world_size() / max(clips, 1))


def ctc(tile: GlossTile) -> Tensor:
    """Minus the log-probability of the glosses in their order, over all alignments (Graves et al. 2006).

    A clip whose glosses do not fit into its word tokens (`words_needed`) makes it infinite.
    """
    return _ctc(tile, tile.classes_IL)


def ctc_in_order_of_video(tile: GlossTile) -> Tensor:
    """`ctc` of the glosses in the order in which they show most clearly: each stands at the word token that is most
    probably it.

    Reordering by weak supervision as in arXiv 2505.15438: a classifier that learned which glosses occur (`gloss_set`)
    tells when. Ours: its place is the most probable word token, and the order is found anew in every step, by the head
    that is trained with it.
    """
    with torch.no_grad():
        shape = (-1, tile.log_probs_IKV.shape[1], -1)
        of_glosses_IKL = tile.log_probs_IKV.gather(2, tile.classes_IL[:, None, :].expand(*shape))
        places_IL = of_glosses_IKL.masked_fill(~tile.real_IK()[..., None], -torch.inf).argmax(1)
        places_IL = places_IL.masked_fill(tile.classes_IL == BLANK, tile.log_probs_IKV.shape[1])
        classes_IL = tile.classes_IL.gather(1, places_IL.argsort(dim=1, stable=True))
    return _ctc(tile, classes_IL)


def _ctc(tile: GlossTile, classes_IL: Tensor) -> Tensor:
    log_probs_KIV = tile.log_probs_IKV.transpose(0, 1)
    return F.ctc_loss(log_probs_KIV, classes_IL, tile.words_I, tile.glosses_I, blank=BLANK, reduction="sum")


def gloss_set(tile: GlossTile) -> Tensor:
    """Binary cross-entropy of every gloss of the vocabulary: does it occur in the clip?

    The order-invariant classifier of arXiv 2505.15438. Ours: a gloss occurs if at least one word token is it, tokens
    being independent (noisy or), and all glosses count alike.
    """
    glosses_IKV = tile.log_probs_IKV[..., BLANK + 1 :].clamp(max=-1e-6)
    absent_IV = (torch.log1p(-glosses_IKV.exp()) * tile.real_IK()[..., None]).sum(1)
    occurs_IV = torch.zeros_like(tile.log_probs_IKV[:, 0]).scatter(1, tile.classes_IL, 1.0)[:, BLANK + 1 :]
    present_IV = torch.log(-torch.expm1(absent_IV.clamp(max=-1e-12)))
    return -(occurs_IV * present_IV + (1 - occurs_IV) * absent_IV).sum()


def words_needed(classes: Sequence[object], any_order: bool = False) -> int:
    """Word tokens that CTC needs for these glosses: one each, and a blank between equal neighbours.

    ``any_order``: enough for them in every order.
    """
    if any_order:
        return 2 * len(classes) - len(set(classes))
    return len(classes) + sum(one == other for one, other in pairwise(classes))


@dataclass(frozen=True, slots=True)
class _Padding:
    """How packed rows of some clips become [clips, most, ...]; made on the host, so that no device is asked."""

    counts_I: Tensor
    """Rows of each clip, int64, on the host."""
    most: int
    rows_K: Tensor
    """Their packed rows, on the device."""
    slots_K: Tensor
    """Where these stand in [clips * most]."""

    @classmethod
    def of(cls, lengths: Sequence[int], clips: list[int], device: torch.device) -> _Padding:
        lengths_B = np.asarray(lengths, dtype=np.int64)
        counts_I, firsts_I = lengths_B[clips], (lengths_B.cumsum() - lengths_B)[clips]
        most = int(counts_I.max())
        at_IK = np.arange(most)[None, :]
        real_IK = at_IK < counts_I[:, None]
        slots_IK = np.arange(len(clips))[:, None] * most + at_IK
        table = torch.from_numpy(np.stack(((firsts_I[:, None] + at_IK)[real_IK], slots_IK[real_IK])))
        rows_K, slots_K = table.to(device, non_blocking=True)
        return cls(torch.from_numpy(counts_I), most, rows_K, slots_K)

    def pad(self, rows_K: Tensor) -> Tensor:
        """The clips' rows, taken from the packed ones, with zeros behind every clip's last."""
        padded = rows_K.new_zeros(len(self.counts_I) * self.most, *rows_K.shape[1:])
        return padded.index_copy(0, self.slots_K, rows_K).unflatten(0, (-1, self.most))


_Place = tuple[_Padding, _Padding]
"""Word tokens and glosses of a tile."""


def _cut_tiles(logits: Tokens, glosses: Glosses, here: list[int], tile_numbers: int) -> list[_Place]:
    """Clips of similar length stand together."""
    order = sorted(here, key=logits.lengths.__getitem__)
    if not order:
        return []
    parts = cut([logits.lengths[clip] for clip in order], tile_numbers // logits.features_NE.shape[1])
    device = logits.features_NE.device
    return [
        (_Padding.of(logits.lengths, order[part], device), _Padding.of(glosses.lengths, order[part], device))
        for part in parts
    ]


class _GlossLoss(torch.autograd.Function):
    """Loss and gradient in the forward pass; backward only multiplies."""

    @staticmethod
    def forward(
        ctx: Any, logits_MV: Tensor, classes_N: Tensor, places: list[_Place], criterion: GlossCriterion
    ) -> Tensor:
        total = wide(logits_MV.new_zeros(()))
        gradient_MV = torch.zeros_like(logits_MV) if ctx.needs_input_grad[0] else None
        for place in places:
            with torch.set_grad_enabled(gradient_MV is not None):
                rows_KV = logits_MV.detach()[place[0].rows_K].requires_grad_(gradient_MV is not None)
                loss = criterion(_tile(rows_KV, classes_N, place))
            total = total + loss.detach()
            if gradient_MV is not None:
                gradient_MV.index_copy_(0, place[0].rows_K, torch.autograd.grad(loss, rows_KV)[0])
        ctx.save_for_backward(gradient_MV)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gradient_MV,) = ctx.saved_tensors
        return (gradient_MV * grads[0]).to(gradient_MV.dtype), None, None, None


def _tile(rows_KV: Tensor, classes_N: Tensor, place: _Place) -> GlossTile:
    words, glosses = place
    log_probs_IKV = words.pad(wide(rows_KV)).log_softmax(-1)
    classes_IL = glosses.pad(classes_N[glosses.rows_K])
    return GlossTile(log_probs_IKV, words.counts_I, classes_IL, glosses.counts_I)
