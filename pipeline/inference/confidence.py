"""How sure a model is of a translation: the probability of its tokens, given the video.

Legend: B clips, L positions of prompt and answer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pipeline.inference.clips import VideoPrompts
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.processing import LlavaSltProcessor


@torch.no_grad()
def confidences(
    model: LlavaSltForConditionalGeneration,
    processor: LlavaSltProcessor,
    batch: VideoPrompts,
    texts: Sequence[str],
) -> list[float]:
    """Geometric mean of the probabilities of each text's tokens, its end included: 0 to 1, whatever its length.

    It depends on the text alone, not on how it was searched for.

    Args:
        model: in eval mode.
        processor: the one that made the batch.
        batch: left padded prompts with the frames of their clips.
        texts: one per clip.
    """
    prompts = [
        ids_L[mask_L.bool()].tolist() for ids_L, mask_L in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    answers = [processor.answer_ids(text) for text in texts]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    ids_BL = torch.tensor([row + [processor.pad_id] * (longest - len(row)) for row in rows])
    mask_BL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    here = model.device
    logits_BLV = model(
        input_ids=ids_BL.to(here),
        attention_mask=mask_BL.to(here),
        frames=batch["frames_NHWC"].to(here),
        layout=batch["layout"].to(here),
    ).logits
    assert logits_BLV is not None
    sure = []
    for row_LV, prompt, answer in zip(logits_BLV, prompts, answers, strict=True):
        steps_LV = torch.log_softmax(row_LV[len(prompt) - 1 : len(prompt) - 1 + len(answer)].float(), -1)
        chosen_L = steps_LV.gather(1, torch.tensor(answer, device=here)[:, None])
        sure.append(math.exp(float(chosen_L.mean())))
    return sure
