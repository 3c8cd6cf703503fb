"""Reading DeepSpeed's ZeRO shards without an engine; the only place that knows their layout."""

from __future__ import annotations

import contextlib
import io
import pickle
from pathlib import Path
from typing import Any

from pipeline import dist
from pipeline.errors import CheckpointError


def fp32_state(folder: Path, tag: str) -> dict[str, Any]:
    """Name -> lazy tensor (call ``.contiguous()``) of every trained parameter and buffer, in fp32.

    Raises:
        CheckpointError: the shards do not form a ZeRO checkpoint.
    """
    dist.choose_accelerator()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            return get_fp32_state_dict_from_zero_checkpoint(
                str(folder), tag=tag, exclude_frozen_parameters=True, lazy_mode=True
            )
    except (ValueError, FileNotFoundError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder / tag} is not a ZeRO checkpoint: {error}") from error
