"""Does the exported folder equal the live model? The checkpoint stores the live model's outputs on a fixed input."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.checkpoint import Checkpoint
from pipeline.errors import CheckpointError

logger = logging.getLogger(__name__)

# Largest |difference| allowed, relative to the largest |live value|. fp32: other summation order. bf16 has 8 bits of
# mantissa, and another device or attention kernel rounds differently in every layer.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def verify_export(folder: Path, checkpoint: Checkpoint, resolved: ResolvedRecipe) -> dict[str, float]:
    """Load ``folder`` as a user would and compare with the live outputs; returns largest absolute differences.

    Raises:
        CheckpointError: an output differs by more than rounding.
    """
    probe = checkpoint.probe()
    dtype = torch.bfloat16 if resolved.recipe.train.precision == "bf16" else torch.float32
    run = {"continued_pretraining": _llm, "contrastive": _visual, "connector": _llava}[resolved.recipe.stage]
    with torch.no_grad():
        outputs = run(folder, probe, dtype)
    differences = {}
    for name, output in outputs.items():
        live = probe[name].float()
        difference = float((output.float() - live).abs().max())
        limit = TOLERANCE[dtype] * max(float(live.abs().max()), 1e-6)
        if not difference <= limit:
            raise CheckpointError(
                f"the exported model differs from the live one: {name} by {difference:.3g} (allowed {limit:.3g}); "
                f"the export of {checkpoint.path} was discarded"
            )
        differences[name] = difference
    logger.info("export equals the live model: %s", {k: f"{v:.2g}" for k, v in differences.items()})
    return differences


def _llm(folder: Path, probe: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return {"logits": model(input_ids=probe["input_ids"], use_cache=False).logits}


def _visual(folder: Path, probe: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from pipeline.models.visual import HierarchicalVisualEncoder

    model = HierarchicalVisualEncoder.from_pretrained(folder, dtype=dtype).eval()
    output = model(probe["frames"], probe["frame_lengths"])
    heads = load_file(folder / "heads.safetensors")
    return {
        "video_BE": output.sentence_BD @ heads["sentence_head.weight"].T,
        "words_BSE": output.words_BSD @ heads["word_head.weight"].T,
    }


def _llava(folder: Path, probe: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from pipeline.models.llava_slt import LlavaSltForConditionalGeneration

    model = LlavaSltForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    inputs = {name: probe[name] for name in ("input_ids", "attention_mask", "frames")}
    return {"logits": model(frame_lengths=probe["frame_lengths"], **inputs).logits}
