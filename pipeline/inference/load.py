"""An exported translation model, loaded completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.errors import CheckpointError, RecipeError
from pipeline.models.generation_attention import choose_for_generation
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.processing import LlavaSltProcessor

Precision = Literal["auto", "fp32", "bf16"]
PRECISIONS: dict[Precision, Any] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}
VIDEO_FORM = "video_form.json"
"""In an export: the `VideoOptions` its training shards were built with (``options.video`` of their manifest)."""
_SHOWN = 3


def load_export(
    export_dir: Path, device: torch.device | str = "cpu", precision: Precision = "auto"
) -> tuple[LlavaSltForConditionalGeneration, LlavaSltProcessor]:
    """Model (eval mode, on ``device``) and processor of an exported folder.

    Args:
        export_dir: folder written by `slt export` for the connector stage.
        device: where to put the weights.
        precision: ``auto`` keeps the precision the weights are stored in.

    Raises:
        CheckpointError: no such folder, not a translation model, or weights that do not cover the model exactly
            (Hugging Face would fill missing ones with random numbers).
        RecipeError: no such device here.
    """
    if not (export_dir / "config.json").is_file():
        raise CheckpointError(
            f"{export_dir} holds no config.json; give the folder that `slt export` wrote for a connector run."
        )
    place = _device(device)
    processor = LlavaSltProcessor.from_pretrained(export_dir)
    try:
        # typed as a model alone, but with loading info it is a pair
        loaded: Any = LlavaSltForConditionalGeneration.from_pretrained(
            export_dir, dtype=PRECISIONS[precision], output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{export_dir}: the model cannot be loaded ({error}); export the run again.") from error
    model, info = loaded
    problems = [
        f"{len(names)} {what} ({', '.join(sorted(map(str, names))[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for what, names in (
            ("weights missing", info["missing_keys"]),
            ("weights that the model does not have", info["unexpected_keys"]),
            ("weights of another shape", info["mismatched_keys"]),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{export_dir}: {'; '.join(problems)}; export the run again.")
    model = model.to(place).eval()
    model.visual.choose_attention("auto", place)
    choose_for_generation(model.llm, place)
    return model, processor


def _device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"device {device!r}: not a device name such as cpu, cuda or cuda:0.") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device {str(place)!r}: no CUDA device is visible to this process; use cpu.")
    return place
