"""The recipe's section `sequence_tuning`: what whole translations are worth, and how that is learned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.section import Section


class SequenceTuningConfig(Section):
    objective: Literal["minimum_risk", "grpo"] = "grpo"
    """`minimum_risk`: the expected risk over the sampled candidates (arXiv 1512.02433). `grpo`: each sample by how far
    its reward is above the mean of its clip's samples (arXiv 2402.03300)."""
    samples: int = Field(default=8, gt=1)
    """Translations sampled per clip and step, each of at most `connector.max_new_tokens` tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it when translations are sampled."""
    bleu_weight: float = Field(default=0.5, ge=0)
    """Of sentence BLEU-4, between 0 and 1, in the reward; by the rules of `connector.score_protocol`."""
    rouge_l_weight: float = Field(default=0.5, ge=0)
    """Of ROUGE-L, between 0 and 1, in the reward; likewise."""
    cross_entropy_weight: float = Field(default=0.0, ge=0)
    """Of the references' cross-entropy, per clip the mean over tokens, beside the objective."""
    sharpness: float = Field(default=0.005, gt=0)
    """minimum_risk: probabilities are raised to it before they are normalised over the candidates; the paper's."""
    include_reference: bool = True
    """minimum_risk: the reference is one of the candidates, as in the paper."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """grpo: a token's ratio of current to sampling policy counts from 1 - clip to 1 + clip. Samples serve one step, so
    at temperature 1 it is 1 up to rounding."""
    kl_weight: float = Field(default=0.0, ge=0)
    """grpo: of the divergence from the start (`model.init_from`), per token as in the paper, which takes 0.04. Above 0
    only connector and adapters of the LLM may train."""

    @property
    def with_reference(self) -> bool:
        """Whether the loss reads the reference's probability."""
        in_set = self.objective == "minimum_risk" and self.include_reference
        return in_set or self.cross_entropy_weight > 0


__all__ = ["SequenceTuningConfig"]
