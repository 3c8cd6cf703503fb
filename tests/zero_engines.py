"""A small model with all that ZeRO treats apart, and real engines of every stage around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.engine.setup import parameter_groups, quiet_deepspeed


class Kind(NamedTuple):
    """How an engine shards."""

    stage: int
    bf16: bool = False
    offload: bool = False
    small_groups: bool = False
    """Stage 3: sub-groups of a few parameters; stage 2: parameters dealt to the ranks in turn."""
    fp32_gradients: bool = False
    """Accumulated in fp32, though the model is in bf16: another optimizer of DeepSpeed's under stage 1."""


class Model(nn.Module):
    """Two parameter groups, a tied, a frozen and a one-element parameter, a buffer, sizes that no world divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.frozen = nn.Linear(6, 6)
        self.body = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.back = nn.Linear(7, 6)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.5]))
        self.frozen.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embed(tokens))
        hidden = self.back(torch.relu(self.norm(self.body(hidden)))) * self.gain * self.scale
        logits = self.head(hidden).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def start(kind: Kind, world_size: int, global_batch: int = 12, load_universal: bool = False) -> Any:
    """A DeepSpeed engine of this kind; the same weights every time. All ranks must call."""
    import deepspeed

    torch.manual_seed(0)
    model = Model().to(torch.bfloat16 if kind.bf16 else torch.float32)
    zero: dict[str, Any] = {"stage": kind.stage}
    if kind.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if kind.small_groups:
        zero |= {"sub_group_size": 20} if kind.stage == 3 else {"round_robin_gradients": True}
    config: dict[str, Any] = {
        "train_batch_size": global_batch, "train_micro_batch_size_per_gpu": global_batch // world_size,
        "zero_optimization": zero, "bf16": {"enabled": kind.bf16}, "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": load_universal},
    }  # fmt: skip
    if kind.fp32_gradients:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2, fused=True)
    with quiet_deepspeed():
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def take_steps(engine: Any, rank: int, world_size: int, first: int, count: int, global_batch: int = 12) -> list[float]:
    """Train on each step's own global batch, of which a rank takes its share; returns this rank's losses."""
    losses = []
    for step in range(first, first + count):
        tokens = torch.randint(0, 11, (global_batch, 5), generator=torch.Generator().manual_seed(step))
        loss = engine(tokens[rank::world_size])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
