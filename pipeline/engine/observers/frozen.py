"""Our own invariant: no bit of a frozen part has changed when a run ends."""

from __future__ import annotations

import hashlib
import json
import logging

import torch
from torch import nn

from pipeline import dist
from pipeline.engine.observers.base import Observer
from pipeline.engine.training import Training
from pipeline.stages.freezing import frozen_buffers, frozen_names

logger = logging.getLogger(__name__)

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 over the golden ratio: neighbouring positions get weights far apart."""
_AT_ONCE = 1 << 22
"""Elements at a time: whole numbers take up to eight times the memory."""


class FrozenParts(Observer):
    """Compares the frozen parts at the end with those at the start."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.at_start = hash_frozen(training.engine.module)

    def on_end(self) -> None:
        now = hash_frozen(self.training.engine.module)
        assert now == self.at_start, "a frozen parameter changed during training"
        if self.training.ranks.is_main and frozen_names(self.training.engine.module):
            logger.info("frozen parameters unchanged (digest %s)", now[:16])


def hash_frozen(module: nn.Module) -> str:
    """A digest of this rank's bits of all frozen parameters and the buffers beside them, combined over ranks.

    Reduced where the weights are; what comes to the host are two numbers per tensor, in one copy.
    """
    tensors = {
        name: getattr(parameter, "ds_tensor", parameter)
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    } | dict(frozen_buffers(module))
    sums: list[list[int]] = []
    if tensors:
        of_tensors = [sums_of_bits(tensor.detach()) for tensor in tensors.values()]
        sums = torch.stack([pair.to(of_tensors[0].device) for pair in of_tensors]).tolist()
    found = dist.gather_objects(list(zip(tensors, sums, strict=True)))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def sums_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [2]: the sum of a tensor's elements read as whole numbers, and the sum weighted by their positions.

    Whole numbers add up to the same in any order. Any change of one element changes the first sum, and an exchange of
    elements the second.
    """
    bits_N = tensor.reshape(-1).view(_WHOLE[tensor.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for begin in range(0, len(bits_N), _AT_ONCE):
        part_N = bits_N[begin : begin + _AT_ONCE].long()
        weights_N = torch.arange(begin, begin + len(part_N), device=tensor.device) * _ODD + 1
        sums += torch.stack([part_N.sum(), (part_N * weights_N).sum()])
    return sums
