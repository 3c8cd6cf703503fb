"""Sequence-level tuning after stage 3: the model translates the training clips itself, and learns from how good its
translations are as a whole. Minimum risk (arXiv 1512.02433) or GRPO (arXiv 2402.03300); the reward is sentence BLEU and
ROUGE-L, as held-out translations are scored.

Every step samples with the weights it then changes. Sampling waits for the device, as every generation does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from pipeline.config.sequence_schema import SequenceTuningConfig
from pipeline.evaluate.metrics import sentence_bleu, sentence_rouge_l
from pipeline.inference.generate import end_ids
from pipeline.inference.sample import Candidate, SamplingOptions, draw_candidates, numbers_of
from pipeline.losses.sequence import Candidates, mean_divergence, minimum_risk, policy_gradient, reference_loss
from pipeline.models.connector import Connector
from pipeline.models.generation_attention import switched
from pipeline.models.streams import frames_of, with_frames
from pipeline.stages.base import LossParts, Normaliser
from pipeline.stages.batches import SequenceBatch, SequenceCollate, to_device
from pipeline.stages.candidates import Group, Ids, row_of, table_of
from pipeline.stages.connector import ConnectorStage
from pipeline.stages.data import Plans, StageContext
from pipeline.stages.tuning_start import as_at_start, check_start, evaluating, source_of_connector, start_connector


class SequenceTuning(ConnectorStage):
    """Goes on where stage 3 ended: the same model, inputs, evaluation and export, another loss."""

    name = "sequence_tuning"
    start: Connector | None = None
    """The connector that tuning started from, where the loss looks back at it: whole, on every rank."""

    @classmethod
    def build(cls, context: StageContext, plans: Plans) -> Self:
        source_of_connector(context.recipe.model)
        stage = super().build(context, plans)
        config = context.recipe.sequence_tuning
        if config.objective == "grpo" and config.kl_weight:
            check_start(stage.trainable)
            stage.start = start_connector(context, stage.module)
        return stage

    def collate(self) -> SequenceCollate:  # type: ignore[override]  # batches of its own, which its loss takes
        return SequenceCollate(self.processor, self.module.config.visual_config.clip_sizes())

    def loss(  # type: ignore[override]  # as above
        self, model: Callable[..., Any], batch: SequenceBatch, normaliser: Normaliser
    ) -> LossParts:
        batch = self._with_features(batch)
        config, groups = self.recipe.sequence_tuning, self._groups(batch, self._samples(batch, normaliser.step))
        row = to_device(row_of(groups, batch["prompts"], self.module.config.video_token_id), self.device)
        candidates = to_device(table_of(groups, self._rewards(batch, groups)), self.device)
        inputs = {
            "input_ids": row["input_ids"],
            "frames": batch["frames_NHWC"],
            "layout": batch["layout"],
            "answers": row["answers"],
        }
        start_N = self._start_log_probs(model, inputs)
        sums = {"samples": torch.full((), float(len(groups)), device=self.device)}

        def criterion(log_probs_N: torch.Tensor) -> torch.Tensor:
            loss_B, reported = objective(config, candidates, log_probs_N, start_N)
            sums.update(reported)
            return loss_B.sum()

        output = model(**inputs, criterion=criterion)
        return LossParts(normaliser.scale(output.loss_sum), {"loss": output.loss_sum.detach(), **sums})

    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        return {name: value / max(sums["samples"], 1) for name, value in sums.items() if name != "samples"}

    def _with_features(self, batch: SequenceBatch) -> SequenceBatch:
        """A frozen backbone runs once for sampling and learning: its features take the images' place."""
        visual, inputs = self.module.visual, batch["frames_NHWC"]
        frames_NHWC = frames_of(inputs)
        if visual.backbone.trains or frames_NHWC.is_floating_point():
            return batch
        with torch.no_grad():
            return {**batch, "frames_NHWC": with_frames(inputs, visual.pooled(frames_NHWC, batch["layout"]))}

    def _samples(self, batch: SequenceBatch, step: int) -> list[list[Candidate]]:
        """Translations of every clip by the model as it is."""
        config, tokens = self.recipe.sequence_tuning, self.recipe.connector.max_new_tokens
        synced = self.context.world_size > 1 and self.context.zero_stage == 3
        options = SamplingOptions(config.samples, config.temperature, tokens, synced)
        numbers_RL = numbers_of(self.recipe.seed, step, batch["rows"], config.samples, tokens)
        with evaluating(self.module), switched(self.module.llm, self.attention_key):
            return draw_candidates(self.module, self.processor, batch, options, numbers_RL)

    def _start_log_probs(self, model: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor | None:
        """Log probabilities of the candidates' tokens under the model that tuning started from, if they are needed."""
        if self.start is None:
            return None
        kept: list[torch.Tensor] = []

        def keep(log_probs_N: torch.Tensor) -> torch.Tensor:
            kept.append(log_probs_N)
            return log_probs_N.sum()

        with torch.no_grad(), evaluating(self.module), as_at_start(self.module, self.start):
            model(**inputs, criterion=keep)
        return kept[0]

    def _groups(self, batch: SequenceBatch, samples: list[list[Candidate]]) -> list[Group]:
        learned = self.recipe.sequence_tuning.with_reference
        return [
            Group.of(drawn, tuple(reference) if learned else None)
            for drawn, reference in zip(samples, batch["references"], strict=True)
        ]

    def _rewards(self, batch: SequenceBatch, groups: list[Group]) -> list[dict[Ids, float]]:
        """Per clip what each candidate's text is worth against the clip's."""
        config, protocol = self.recipe.sequence_tuning, self.recipe.connector.score_protocol
        ends = end_ids(self.module, self.processor)
        rewards = []
        for row, group in zip(batch["rows"], groups, strict=True):
            texts = {ids: self.processor.decode(torch.tensor([ids]), ends)[0] for ids in group.counts}
            rewards.append({ids: reward_of(text, row.text, config, protocol) for ids, text in texts.items()})
        return rewards


def reward_of(text: str, reference: str, config: SequenceTuningConfig, protocol: str) -> float:
    """The weighted sum of sentence BLEU-4 and ROUGE-L, each between 0 and 1."""
    reward = 0.0
    if config.bleu_weight:
        reward += config.bleu_weight * sentence_bleu(text, [reference], protocol) / 100
    if config.rouge_l_weight:
        reward += config.rouge_l_weight * sentence_rouge_l(text, [reference], protocol) / 100
    return reward


def objective(
    config: SequenceTuningConfig,
    candidates: Candidates,
    log_probs_N: torch.Tensor,
    start_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of clips [B] from the log probabilities of their candidates' tokens, and sums over clips to report.
    ``start_N``: the same under the model that tuning started from."""
    counts_BK = candidates.counts_BK
    share_BK = counts_BK / counts_BK.sum(1, keepdim=True)
    sums = {
        "reward": (candidates.rewards_BK * share_BK).sum(),
        "distinct_candidates": (counts_BK > 0).float().sum(),
        "candidate_tokens": (candidates.mask_BKL.sum(2) * share_BK).sum(),
    }
    if config.objective == "minimum_risk":
        loss_B = minimum_risk(log_probs_N, candidates, config.sharpness, config.include_reference)
    else:
        start = None if start_N is None else (start_N, config.kl_weight)
        loss_B = policy_gradient(log_probs_N, candidates, config.clip, start)
        if start_N is not None:
            sums["divergence"] = mean_divergence(log_probs_N.detach(), start_N, candidates).sum()
    if config.cross_entropy_weight:
        entropy_B = reference_loss(log_probs_N, candidates)
        sums["cross_entropy"] = entropy_B.detach().sum()
        loss_B = loss_B + config.cross_entropy_weight * entropy_B
    return loss_B, sums
