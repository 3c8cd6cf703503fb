"""The recipe's section `train`: length, batch, optimizer, checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.parts_schema import PartConfig
from pipeline.config.section import Section
from pipeline.config.transfer_schema import AveragingConfig, EarlyStopConfig


class OptimizerConfig(Section):
    lr: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay per step, times the learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of gradients and of their squares."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """`wsd`: warm-up, stable, then linear decay over the last `decay_fraction`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly to `lr`."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Last learning rate as a part of `lr` (cosine, wsd)."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Part of the steps over which `wsd` decays."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class CheckpointConfig(Section):
    every_steps: int = Field(default=0, ge=0)
    """0 = only at the end."""
    every_minutes: float = Field(default=0.0, ge=0)
    """Also after this much time; 0 = by steps only."""
    keep: int = Field(default=2, gt=0)
    """Newest complete checkpoints kept (the best one is kept besides)."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Also kept: checkpoints whose step is a multiple of this; 0 = none."""
    background: bool = True
    """Copy the state to host memory and write it while training goes on; false: training waits for the write,
    without the copy."""
    resume: Literal["if_present", "require", "never"] = "if_present"
    """`if_present`: continue where the run directory holds a checkpoint; `require`: refuse to start
    without one; `never`: refuse one."""
    damaged: Literal["fall_back", "stop"] = "fall_back"
    """When bytes of the newest checkpoint are damaged: use the newest intact one and say so, or stop."""


class HealthConfig(Section):
    max_rollbacks: int = Field(default=2, ge=0)
    """How often a run in trouble returns to its last good checkpoint, and goes on with the samples that follow, before
    it stops as diverged; 0 = it stops at once."""
    spike_factor: float = Field(default=10.0, ge=0)
    """A gradient norm above this many times its running mean is a spike; 0 = none is."""
    loss_spike_factor: float = Field(default=3.0, ge=0)
    """The same for the loss of a row of metrics."""
    spike_window_steps: int = Field(default=100, gt=0)
    """Steps that the running means remember; nothing is a spike before as many."""
    on_spike: Literal["warn", "skip", "rollback"] = "warn"
    """`warn`: name and count it; `skip`: also do not apply a step whose gradient norm is one; `rollback`: also roll
    back when the loss is one."""
    straggler_ratio: float = Field(default=1.2, gt=1)
    """A rank that computes this many times longer than the median rank, in three rows of metrics in a row, is named."""


class TrainConfig(Section):
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data, whole global batches; give this or `steps`."""
    global_batch: int = Field(gt=0)
    """Items per optimizer step over all ranks: packs, clips or clip groups."""
    micro_batch: int = Field(gt=0)
    """Items per forward per rank."""
    world_sizes: list[int] = [1]
    """World sizes this recipe is meant for; each must divide the batch exactly."""
    sequence_parallel: int = Field(default=1, gt=0)
    """Ranks that compute every pack together, each a slice of its positions (continued_pretraining); they divide the
    world size, `data.block_tokens` and the LLM's attention heads. 1 = every rank computes whole packs."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of weights and activations in forward and backward."""
    compile: Literal["none", "layers", "deepcompile"] = "none"
    """`layers`: torch.compile of each (ZeRO stages 0 to 2); `deepcompile`: DeepSpeed's (continued_pretraining)."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    parts: dict[str, PartConfig] = {}
    """Part of the model -> whether it trains, and its own learning rate; all others as the stage plans."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, what to keep."""
    log_every_steps: int = Field(default=10, gt=0)
    """Steps per row of metrics; one more is written before an evaluation."""
    eval_every_steps: int = Field(default=0, ge=0)
    """0 = only before and after training."""
    eval_batches: int = Field(default=0, ge=0)
    """Held-out global batches per evaluation (continued_pretraining: per corpus); 0 = all."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Consecutive steps that are not applied, because loss or gradients are not finite, before the run rolls back."""
    health: HealthConfig = HealthConfig()
    """Rollbacks, spikes and slow ranks."""
    averaging: AveragingConfig = AveragingConfig()
    """A mean of the weights over the steps, to evaluate and export."""
    early_stop: EarlyStopConfig | None = None
    """End before the last step once the held-out metric stays where it is; None = never."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""
    sample_ledger: bool = False
    """Also write which samples every step of every rank was made of (`logs/ledger-rank-N.jsonl`): the proof that
    interruptions lose and repeat none."""
    tensorboard: bool = True
    """Also write TensorBoard files into the run directory."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense peak of one device in the training precision; gives MFU. Known NVIDIA devices fill it themselves."""
