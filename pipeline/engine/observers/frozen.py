"""Our own invariant: no bit of a frozen part has changed when a run ends."""

from __future__ import annotations

import hashlib
import json
import logging

from torch import nn

from pipeline import dist
from pipeline.engine.observers.base import Observer
from pipeline.engine.training import Training
from pipeline.stages.freezing import bytes_of, frozen_buffers, frozen_names

logger = logging.getLogger(__name__)


class FrozenParts(Observer):
    """Compares the frozen parts at the end with those at the start."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.at_start = hash_frozen(training.engine.module)

    def on_end(self) -> None:
        now = hash_frozen(self.training.engine.module)
        assert now == self.at_start, "a frozen parameter changed during training"
        if self.training.ranks.is_main and frozen_names(self.training.engine.module):
            logger.info("frozen parameters unchanged (sha256 %s)", now[:16])


def hash_frozen(module: nn.Module) -> str:
    """sha256 over this rank's bytes of all frozen parameters and the buffers beside them, combined over ranks."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode() + bytes_of(getattr(parameter, "ds_tensor", parameter)))
    for name, buffer in frozen_buffers(module):
        digest.update(name.encode() + bytes_of(buffer))
    return hashlib.sha256(json.dumps(dist.gather_objects(digest.hexdigest())).encode()).hexdigest()
