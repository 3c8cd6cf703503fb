"""Losses of whole translations: of candidates of a clip, by how good each one is.

`minimum_risk` is the expected risk over a set of candidates (Shen et al. 2016, arXiv 1512.02433), `policy_gradient`
the objective of GRPO (arXiv 2402.03300, equation 3). Both are functions of the candidates' token log probabilities and
give one number per clip.

Shape suffixes: B clips, K candidates of a clip at most, L tokens of a candidate at most, N tokens of all candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ADVANTAGE_EPSILON = 1e-6
"""Added to the deviation of a clip's rewards: where all are equal, every advantage is 0."""


class Candidates(NamedTuple):
    """Where tokens belong, and what is known of candidates. Entries without a candidate hold zeros."""

    places_N: Tensor
    """int64, of every token in the flattened table [B, K, L]."""
    mask_BKL: Tensor
    """1.0 where the table holds a token."""
    counts_BK: Tensor
    """How often each candidate was sampled; 0 for a reference that was not."""
    rewards_BK: Tensor
    """Of each, the larger the better."""
    is_reference_BK: Tensor
    """1.0 at the references."""
    sampled_N: Tensor
    """Log probabilities of the tokens under the policy that sampled them; of a reference that was not sampled anything.
    """

    def table(self, values_N: Tensor) -> Tensor:
        """[B, K, L] of numbers of tokens, zeros elsewhere."""
        flat = values_N.new_zeros(self.mask_BKL.numel())
        return flat.index_copy(0, self.places_N, values_N).view(self.mask_BKL.shape)


def minimum_risk(log_probs_N: Tensor, candidates: Candidates, sharpness: float, with_reference: bool) -> Tensor:
    """Expected risk [B], ``1 - reward`` under ``P(candidate) ** sharpness`` renormalised over the clip's candidates.

    A candidate counts once however often it was sampled: the set is a part of the search space, not a sample of it.

    Args:
        with_reference: the reference is one of the candidates.
    """
    in_set_BK = candidates.counts_BK > 0
    if with_reference:
        in_set_BK = in_set_BK | (candidates.is_reference_BK > 0)
    scores_BK = sharpness * candidates.table(log_probs_N).sum(2)
    weights_BK = scores_BK.masked_fill(~in_set_BK, -torch.inf).softmax(1)
    return (weights_BK * (1 - candidates.rewards_BK)).sum(1)


def policy_gradient(
    log_probs_N: Tensor, candidates: Candidates, clip: float, start: tuple[Tensor, float] | None = None
) -> Tensor:
    """The negative objective of GRPO [B]: per clip the mean over its samples of each one's mean over tokens.

    Args:
        clip: how far the ratio of both policies counts, from ``1 - clip`` to ``1 + clip``.
        start: log probabilities [N] under the policy that tuning started from, and the weight of the divergence from
            it, which is estimated per token as in the paper (equation 4).
    """
    now_BKL = candidates.table(log_probs_N)
    ratio_BKL = (now_BKL - candidates.table(candidates.sampled_N)).exp()
    advantages_BK1 = advantages(candidates.rewards_BK, candidates.counts_BK)[..., None]
    gain_BKL = torch.minimum(ratio_BKL * advantages_BK1, ratio_BKL.clamp(1 - clip, 1 + clip) * advantages_BK1)
    if start is not None:
        start_N, weight = start
        gain_BKL = gain_BKL - weight * divergence(now_BKL, candidates.table(start_N))
    return -_mean_over_samples(gain_BKL, candidates)


def advantages(rewards_BK: Tensor, counts_BK: Tensor) -> Tensor:
    """[B, K], how far a candidate's reward is above the mean over the clip's samples, in their deviation."""
    samples_B1 = counts_BK.sum(1, keepdim=True)
    centred_BK = rewards_BK - (rewards_BK * counts_BK).sum(1, keepdim=True) / samples_B1
    variance_B1 = (centred_BK.square() * counts_BK).sum(1, keepdim=True) / samples_B1
    return centred_BK / (variance_B1.sqrt() + ADVANTAGE_EPSILON)


def divergence(now: Tensor, start: Tensor) -> Tensor:
    """Estimate of the divergence of a policy from its start by one token's log probabilities under both; never
    negative, and on average exact."""
    difference = start - now
    return difference.exp() - difference - 1


def mean_divergence(now_N: Tensor, start_N: Tensor, candidates: Candidates) -> Tensor:
    """`divergence` [B], averaged as `policy_gradient` does."""
    return _mean_over_samples(divergence(candidates.table(now_N), candidates.table(start_N)), candidates)


def reference_loss(log_probs_N: Tensor, candidates: Candidates) -> Tensor:
    """Cross-entropy of the reference [B], the mean over its tokens."""
    mask_BKL = candidates.mask_BKL * candidates.is_reference_BK[..., None]
    return -(candidates.table(log_probs_N) * mask_BKL).sum((1, 2)) / mask_BKL.sum((1, 2)).clamp(min=1)


def _mean_over_samples(values_BKL: Tensor, candidates: Candidates) -> Tensor:
    mask_BKL, counts_BK = candidates.mask_BKL, candidates.counts_BK
    of_candidate_BK = (values_BKL * mask_BKL).sum(2) / mask_BKL.sum(2).clamp(min=1)
    return (of_candidate_BK * counts_BK).sum(1) / counts_BK.sum(1)
