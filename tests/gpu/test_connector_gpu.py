"""Stage 3 on a GPU: packed rows of every backend against samples one by one, no waiting, and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.attention import FORWARD_ERROR, GRADIENT_ERROR, obstacle, relative_error
from pipeline.config.schema import LlmConfig, TinyLlm
from pipeline.models.attention import BACKENDS, choose_for, implementation
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.generation_attention import generation_key, switched
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.registry import build_llava_slt
from pipeline.stages.batches import to_device
from tests.unit.pipeline.models.tiny import bpe_tokenizer, clips, data_config, model_config, shake, visual_config

pytestmark = pytest.mark.gpu

LENGTHS = (13, 4, 9, 61)
TEXTS = ["tomorrow it rains", "here", "I am here in the north", "it rains"]
CUDA = torch.device("cuda")


def built(folder: Path, dtype: torch.dtype) -> tuple[LlavaSltForConditionalGeneration, LlavaSltProcessor]:
    """The same weights in every precision, frozen as the stage freezes them."""
    bpe_tokenizer(folder)
    torch.manual_seed(0)
    llm = LlmConfig(tiny=TinyLlm(width=128, layers=2, heads=2, feed_forward=128), tokenizer=str(folder))
    visual = visual_config(width=128)  # 64 channels per head, which every kernel takes
    recipe, prompt = model_config(folder, llm=llm, visual=visual), "signs: {video} sentence:"
    model, processor = build_llava_slt(recipe, data_config(), prompt, torch.float32)
    shake(model)
    model.requires_grad_(False).connector.requires_grad_(True)
    return model.to(CUDA, dtype).train(), processor


def batch_of(model: LlavaSltForConditionalGeneration, processor: LlavaSltProcessor, *samples: int) -> dict[str, Any]:
    frames = clips(*LENGTHS)[0].split(list(LENGTHS))
    lengths = [LENGTHS[n] for n in samples]
    layout = ClipLayout.of(lengths, model.config.visual_config.clip_sizes())
    row = processor.pack(lengths, [TEXTS[n] for n in samples])
    return to_device({**row, "frames": torch.cat([frames[n] for n in samples]), "layout": layout}, CUDA)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_row_equals_its_samples_and_waits_for_nothing(backend: str, tmp_path: Path) -> None:
    if reason := obstacle(backend, "cuda"):
        pytest.skip(reason)
    reference, processor = built(tmp_path, torch.float32)
    losses = []
    with switched(reference.llm, implementation("sdpa")):
        for sample in range(len(LENGTHS)):
            losses.append(reference(**batch_of(reference, processor, sample)).loss_sum)
            losses[-1].backward()
    model, _ = built(tmp_path, torch.bfloat16)
    choose_for(model.llm, backend, CUDA)
    model.visual.choose_attention(backend, CUDA)
    batch = batch_of(model, processor, *range(len(LENGTHS)))
    model(**batch)  # libraries compile and allocate in their first call
    torch.cuda.synchronize()
    if backend != "sdpa":  # which computes documents of equal length together, and asks for these lengths
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss = model(**batch).loss_sum
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(loss.detach(), torch.stack(losses).sum().detach()) < 2 * FORWARD_ERROR
    for mine, other in zip(model.connector.parameters(), reference.connector.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert relative_error(mine.grad, other.grad) < 4 * GRADIENT_ERROR


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_with_the_library_of_training_equals_sdpa(backend: str, tmp_path: Path) -> None:
    """Left padded prompts and a cache; greedy tokens may part once where two are nearly equal."""
    if reason := obstacle(backend, "cuda"):
        pytest.skip(reason)
    model, processor = built(tmp_path, torch.bfloat16)
    model.eval()
    prompts = to_device(dict(processor(LENGTHS)), CUDA)
    frames_NHWC, lengths_B = clips(*LENGTHS)
    inputs = {**prompts, "frames": frames_NHWC.cuda(), "frame_lengths": lengths_B.cuda()}
    expected = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with switched(model.llm, generation_key(model.llm, backend)):
        new = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert (new == expected).float().mean() > 0.7
