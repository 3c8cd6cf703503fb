"""A device or host without memory left becomes one message: where, what is largest, which settings make it smaller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from pipeline.config.resolve import ResolvedRecipe
from pipeline.errors import OutOfMemoryError, SltError

if TYPE_CHECKING:
    from pipeline.memory.plan import MemoryPlan

_SIGNS = (
    "out of memory",  # torch's CUDA allocator, the CUDA driver, NCCL
    "not enough memory", "can't allocate memory",  # torch's CPU allocator
    "alloc_failed",  # cuBLAS and cuDNN handles
)  # fmt: skip
_SHOWN_ITEMS, _SHOWN_FIELDS = 3, 6


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextlib.contextmanager
def named_if_out_of_memory(resolved: ResolvedRecipe, where: str) -> Iterator[None]:
    """Turn a failed allocation into our error.

    Args:
        resolved: the run's recipe.
        where: what the rank was doing, such as ``step 12``.

    Raises:
        OutOfMemoryError: names the largest items of the plan and the settings that change them.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # what the failed step held is freed only when its frames are gone, and the plan needs some memory
        error.__traceback__ = None
        cause = str(error).partition(". GPU ")[0].partition("\n")[0] or type(error).__name__
        raise OutOfMemoryError(
            f"{where} of the {resolved.recipe.stage} stage ran out of memory ({cause.strip().rstrip('.')})."
            f" {_planned(resolved)}. `slt launch plan` shows the whole table"
        ) from None


def _planned(resolved: ResolvedRecipe) -> str:
    from pipeline.memory.plan import plan_memory

    try:
        plan = plan_memory(resolved)
    except (SltError, RuntimeError, MemoryError) as problem:
        return f"The memory planner has no answer here: {str(problem) or type(problem).__name__}"
    return _words(plan)


def _words(plan: MemoryPlan) -> str:
    from pipeline.memory.lines import GIB

    largest = plan.largest(_SHOWN_ITEMS)
    items = ", ".join(f"{line.item} {line.bytes / GIB:.2f} GiB ({line.rule})" for line in largest)
    fields = list(dict.fromkeys(field for line in plan.largest(len(plan.lines)) for field in line.fields))
    return (
        f"The planner counts {plan.peak_bytes / GIB:.2f} GiB per rank, most in {plan.phase}: {items}. Change"
        f" {', '.join(fields[:_SHOWN_FIELDS])}"
    )


__all__ = ["is_out_of_memory", "named_if_out_of_memory"]
