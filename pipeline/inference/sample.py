"""Candidate translations drawn from a model: the same ones for any micro-batch and any number of ranks, and again after
a resume.

A token is drawn by inverting the distribution function at a number that the seed, the optimizer step, the sample, the
candidate and the place decide (`shards.load.draws`); those of dropout are not used. Two runs draw the same unless a
number falls between two tokens' borders that rounding has moved: in fp32 about one token in a million.

Legend: B clips, K candidates of a clip, R = B * K rows, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from pipeline.inference.clips import VideoPrompts
from pipeline.inference.generate import GenerationOptions, end_ids
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.processing import LlavaSltProcessor
from shards.load.draws import Draw, Purpose
from shards.schema import IndexRow, text_hash


@dataclass(frozen=True, slots=True)
class Candidate:
    """One drawn translation."""

    ids: tuple[int, ...]
    """Up to the token that ends it, or as many as may be drawn."""
    log_probs: tuple[float, ...]
    """Of its tokens under the distribution they were drawn from."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How candidates are drawn."""

    samples: int
    """Per clip."""
    temperature: float
    """Logits are divided by it."""
    max_new_tokens: int
    synced: bool = False
    """As in `GenerationOptions`."""


def numbers_of(seed: int, step: int, rows: Sequence[IndexRow], samples: int, tokens: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 [R, L]: of every sample those of its candidates, one after another."""
    names = [text_hash(f"{row.corpus}/{row.sample_id}") for row in rows]
    tables = [Draw(Purpose.CANDIDATES, seed, name, step).randoms(samples * tokens) for name in names]
    return torch.from_numpy(np.concatenate(tables).reshape(-1, tokens))


class InverseDraw(LogitsProcessor):
    """Leaves one token per row, drawn from the distribution of the logits; a greedy search then takes it.

    Args:
        numbers_RL: of `numbers_of`, on the device of the logits.
        temperature: of `SamplingOptions`.
    """

    def __init__(self, numbers_RL: Tensor, temperature: float) -> None:
        self.numbers_RL, self.temperature = numbers_RL, temperature
        self.log_probs: list[Tensor] = []
        """Per token drawn so far its log probability [R]."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # new tokens only: the prompt enters as embeddings
        place = input_ids.shape[1]
        logits_RV = scores.double() if scores.dtype == torch.float64 else scores.float()
        log_probs_RV = torch.log_softmax(logits_RV / self.temperature, -1)
        mass_RV = log_probs_RV.double().exp().cumsum(-1)
        targets_R1 = self.numbers_RL[:, place : place + 1] * mass_RV[:, -1:]
        drawn_R1 = torch.searchsorted(mass_RV, targets_R1, right=True).clamp(max=mass_RV.shape[1] - 1)
        self.log_probs.append(log_probs_RV.gather(1, drawn_R1)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_R1, 0.0)


@torch.no_grad()
def draw_candidates(
    model: LlavaSltForConditionalGeneration,
    processor: LlavaSltProcessor,
    batch: VideoPrompts,
    options: SamplingOptions,
    numbers_RL: Tensor,
) -> list[list[Candidate]]:
    """Per clip its candidates, in the order in which they were drawn. The host waits for them.

    Args:
        model: in eval mode, on the device of the batch.
        processor: the one that made the batch.
        batch: left padded prompts with the frames of their clips.
        options: how they are drawn. Under ZeRO-3 all ranks draw until the last one is done (`synced`).
        numbers_RL: of `numbers_of`, for these clips and options.
    """
    draw, ends = (
        InverseDraw(numbers_RL.to(model.device, non_blocking=True), options.temperature),
        end_ids(model, processor),
    )
    search = GenerationOptions(num_beams=1, max_new_tokens=options.max_new_tokens, synced=options.synced)
    ids_RL = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        frames=batch["frames_NHWC"],
        layout=batch["layout"],
        generation_config=search.config(ends if len(ends) > 1 else ends[0], processor.pad_id),
        copies=options.samples,
        synced_gpus=options.synced,
        logits_processor=[draw],
    )
    log_probs_RL = torch.stack(draw.log_probs, 1).tolist()
    drawn = [_cut(ids, log_probs, ends) for ids, log_probs in zip(ids_RL.tolist(), log_probs_RL, strict=True)]
    return [drawn[first : first + options.samples] for first in range(0, len(drawn), options.samples)]


def _cut(ids: list[int], log_probs: list[float], ends: Sequence[int]) -> Candidate:
    """Without what follows the first token that ends a text: rows that are done wait for the others."""
    length = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return Candidate(tuple(ids[:length]), tuple(log_probs[:length]))
