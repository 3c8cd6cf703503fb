"""ZeRO shards on disk -> the tensors of an export, one at a time, without a GPU, the engine or the job's world size."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from pipeline.engine.checkpoint import TAG, Checkpoint
from pipeline.engine.zero_shards import ZeroShards
from pipeline.export.entry import Entry, written_dtype


def checkpoint_entries(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Entry]:
    """Every trained parameter and buffer in a checkpoint, in the model's order, floats as ``dtype``.

    Of parameters it is their mean over the steps, if the run kept one.

    Frozen parameters are not in the checkpoint; they come from the recipe's source folders.
    """
    shards = ZeroShards.open(checkpoint.path / TAG)
    for name, tensor in shards.buffers().items():
        yield Entry(name, tuple(tensor.shape), written_dtype(tensor.dtype, dtype), functools.partial(_given, tensor))
    kind = shards.exported
    stored_names = {name: name for name in shards.parameters} | shards.shared
    for name, stored in stored_names.items():
        if stored in shards.parameters:  # else it is tied to a frozen one
            yield Entry(name, tuple(shards.parameters[stored]), dtype, functools.partial(shards.tensor, stored, kind))


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
