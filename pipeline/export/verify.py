"""Does the exported folder equal the live model? The checkpoint stores the live model's outputs on a fixed input."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.checkpoint import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.stages.registry import stage_class

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
    with torch.no_grad():
        outputs = stage_class(resolved.recipe.stage).exported(folder, probe, dtype)
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
