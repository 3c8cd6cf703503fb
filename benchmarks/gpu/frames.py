"""Section e: a frame tower of DINOv2-small's shape with LoRA inside our visual encoder, forward and backward in bf16:
clips per second and peak memory at two batch sizes. Weights are random; only shapes matter here."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from benchmarks.gpu.rows import Probe, run_section
from benchmarks.gpu.training import peak_gib, reset_memory, synchronise

FRAMES = 64


def backbone_folder(probe: Probe) -> Path:
    """A Hugging Face folder of the tower."""
    from transformers import Dinov2Config, Dinov2Model

    width, layers, heads, pixels = (32, 1, 2, 56) if probe.dry else (384, 12, 6, 518)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": pixels}
    folder = probe.work / "dinov2"
    if not folder.is_dir():
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(patch_size=14, **sizes)).save_pretrained(folder)
        normalisation = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        (folder / "preprocessor_config.json").write_text(json.dumps(normalisation), encoding="utf-8")
    return folder


def measure(probe: Probe, clips: int, frames_per_pass: int, pixels: int, frames: int) -> tuple[float, float | None]:
    """Clips per second and peak GiB."""
    from pipeline.config.schema import BackboneConfig, VisualConfig
    from pipeline.models.registry import build_visual

    reset_memory(probe)
    backbone = BackboneConfig(path=str(backbone_folder(probe)), train="lora", frames_per_pass=frames_per_pass)
    encoder = build_visual(VisualConfig(backbone=backbone, width=512 if not probe.dry else 32), pixels, torch.bfloat16)
    encoder.to(probe.device).train()
    frames_NHWC = torch.randint(0, 256, (clips * frames, pixels, pixels, 3), dtype=torch.uint8, device=probe.device)
    lengths_B = torch.full((clips,), frames, device=probe.device)
    rounds, seconds = (1, 1) if probe.dry else (2, 5), []
    for number in range(sum(rounds)):
        synchronise(probe)
        start = time.perf_counter()
        output = encoder(frames_NHWC, lengths_B)
        (output.sentence_BD.float().square().sum() + output.words_MD.float().square().sum()).backward()
        encoder.zero_grad(set_to_none=True)
        synchronise(probe)
        if number >= rounds[0]:
            seconds.append(time.perf_counter() - start)
    return clips * len(seconds) / sum(seconds), peak_gib(probe)


def run(probe: Probe) -> None:
    pixels, frames = (28, 8) if probe.dry else (224, FRAMES)
    for clips, frames_per_pass in ((2, 0), (3, 4)) if probe.dry else ((4, 0), (16, 0), (16, 256)):
        title = f"{clips} clips of {frames} frames at {pixels} px" + (
            f", {frames_per_pass} a pass" * bool(frames_per_pass)
        )
        try:
            rate, peak = measure(probe, clips, frames_per_pass, pixels, frames)
        except torch.cuda.OutOfMemoryError as error:
            probe.add(title, False, "out of memory", text=str(error)[:500])
            continue
        shown = f"{rate:.1f} clips/s, {rate * frames:,.0f} frames/s, peak {peak} GiB"
        probe.add(title, True, shown, clips_per_second=rate, peak_gib=peak)


if __name__ == "__main__":
    run_section("frames", run)
