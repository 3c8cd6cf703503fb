"""Which backbone stored frame features belong to."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from pipeline.models.visual import VisualEncoderConfig


def export_fingerprint(folder: Path, config: VisualEncoderConfig) -> str:
    """Identity of the pooled features of an exported encoder whose backbone was trained with it."""
    identity = [weights_digest(folder), config.pool, config.image_pixels, config.image_mean, config.image_std]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=4)
def weights_digest(folder: Path) -> str:
    """sha256 over the weight files of a Hugging Face folder, in the order of their names."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digests = []
    for path in files:
        with path.open("rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256").hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()
