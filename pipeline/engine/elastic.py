"""Loads a checkpoint into an engine that shards otherwise: another world size, another ZeRO stage, both.

Every rank puts the state together that it would have saved itself, from the elements of the old shards that it needs,
and gives it to DeepSpeed's optimizer. Nothing is converted on disk, no rank reads more than its own share, and fp32
weights and moments stay what they are to the bit.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from pipeline import dist
from pipeline.engine.setup import quiet_deepspeed
from pipeline.engine.zero_layout import ZeroLayout, adam_state, cut_by, uncut
from pipeline.engine.zero_shards import Kind, ZeroShards
from pipeline.errors import CheckpointError

logger = logging.getLogger(__name__)


def layout_of(engine: Any) -> ZeroLayout:
    """How a live DeepSpeed engine cuts its trained parameters."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        trained = {name: p.shape for name, p in engine.module.named_parameters() if p.requires_grad}
        return uncut(trained, dist.world_size(), adam_state(engine.optimizer.state_dict())["param_groups"])
    return cut_by(engine._get_zero_param_shapes(), engine.optimizer.state_dict(), stage)


def load_elastically(engine: Any, shards: ZeroShards) -> None:
    """Weights, optimizer state, buffers and counts from shards of any layout. All ranks must call.

    Raises:
        CheckpointError: the shards hold other parameters than the engine trains, or it keeps its state on NVMe.
    """
    if engine.zero_nvme_offload_optimizer():
        raise CheckpointError(
            f"{shards.folder} was saved by other ranks, which a run with its optimizer on NVMe cannot take over; "
            "fix: offload_optimizer.device=cpu, or go on with the world size and ZeRO stage that saved"
        )
    mine = layout_of(engine)
    _check_parameters(shards, mine)
    if dist.is_main():
        logger.info(
            "%s: saved by %d ranks under ZeRO stage %d, read by %d under stage %d",
            shards.folder, shards.world_size, shards.zero_stage, mine.world_size, engine.zero_optimization_stage(),
        )  # fmt: skip
    with quiet_deepspeed(), torch.no_grad():
        if mine.cut == "nothing":
            _load_uncut(engine, shards, mine)
        else:
            _load_cut(engine, shards, mine)
        stored = shards.buffers()
        for name, buffer in engine.module.named_buffers():
            if name in stored:
                buffer.copy_(stored[name])
    for name, count in shards.counts().items():
        setattr(engine, name, count)


def _check_parameters(shards: ZeroShards, mine: ZeroLayout) -> None:
    saved = shards.layout.shapes
    wrong = [
        f"{name}: {tuple(saved[name]) if name in saved else 'not'} saved, "
        f"{tuple(mine.shapes[name]) if name in mine.shapes else 'not'} trained"
        for name in sorted(saved.keys() | mine.shapes.keys())
        if saved.get(name) != mine.shapes.get(name)
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"{shards.folder} holds other parameters than this run trains:\n  " + "\n  ".join(wrong[:8]) + more
            + "\n  fix: the recipe of the run that saved, or a new run_dir"
        )  # fmt: skip


def _load_cut(engine: Any, shards: ZeroShards, mine: ZeroLayout) -> None:
    """Stages 1 to 3, through the state that DeepSpeed would have read from this rank's own file."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    state, rank = optimizer.state_dict(), dist.rank()
    names = mine.groups()
    key = "fp32_flat_groups" if mine.cut == "parameters" else "single_partition_of_fp32_groups"
    state[key] = [share_of(shards, mine, rank, group, "weight") for group in range(len(names))]
    adam_state(state)["state"] = {
        group: {
            "step": torch.tensor(float(max(shards.step(name) for name in names[group]))),
        }
        | {kind: share_of(shards, mine, rank, group, kind) for kind in shards.kinds if kind != "weight"}
        for group in range(len(names))
    }
    by_rank: list[dict[str, Any] | None] = [None] * dist.world_size()
    by_rank[rank] = state
    optimizer.load_state_dict(by_rank, load_optimizer_states=True, load_from_fp32_weights=True)
    if mine.cut == "groups":
        optimizer.update_lp_params()
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


def share_of(shards: ZeroShards, mine: ZeroLayout, rank: int, group: int, kind: Kind) -> torch.Tensor:
    """A rank's flat tensor of a group under layout ``mine``, in fp32; zeros where it is only filled up."""
    flat = torch.zeros(mine.length(group), dtype=torch.float32)
    for name, (of, _) in mine.places.items():
        at = 0
        for piece in mine.pieces(name) if of == group else ():
            length = piece.stop - piece.start
            if piece.rank == rank:
                flat[piece.start : piece.stop] = shards.elements(name, kind, at, at + length)
            at += length
    return flat


def _load_uncut(engine: Any, shards: ZeroShards, mine: ZeroLayout) -> None:
    """Stage 0: every rank reads everything."""
    optimizer = engine.optimizer
    state = optimizer.state_dict()
    adam_state(state)["state"] = {
        number: {"step": torch.tensor(float(shards.step(name)))}
        | {kind: shards.tensor(name, kind) for kind in shards.kinds if kind != "weight"}
        for name, (number, _) in mine.places.items()
    }
    if "fp32_groups" in state:  # the model is in bf16
        by_number = iter(sorted(mine.places, key=lambda name: mine.places[name]))
        state["fp32_groups"] = [[shards.tensor(next(by_number)) for _ in group] for group in state["fp32_groups"]]
    optimizer.load_state_dict(state)
    for name, parameter in engine.module.named_parameters():
        if name in mine.shapes:
            parameter.copy_(shards.tensor(name))


def renew_adam(wrapper: Any) -> None:
    """Each state's own count of steps, where its weights are; the fused kernel, whatever the run that saved used."""
    optimizer = getattr(wrapper, "optimizer", wrapper)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone().to(parameter.device)
    for group in optimizer.param_groups:
        group["fused"] = True
