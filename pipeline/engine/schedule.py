"""Learning rate as a pure function of the step: nothing to save, nothing to resume wrongly."""

from __future__ import annotations

import math

from pipeline.config.rates import Rate
from pipeline.config.train_schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of ``total_steps``.

    Linear warm-up, then `cosine` (arXiv 1608.03983), `wsd` (warm-up, stable, linear decay; arXiv 2404.06395) or
    `constant`; the last step runs at ``lr * final_lr_fraction``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.final_lr_fraction
    span = max(total_steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    start = 1 - config.decay_fraction
    return (
        config.lr if progress < start else config.lr + (floor - config.lr) * (progress - start) / config.decay_fraction
    )


def scheduled_rate(config: OptimizerConfig, rate: Rate, step: int, total_steps: int) -> float:
    """Of one group: the same curve, from its first step on and times its scale; 0 before."""
    if step < rate.start_step:
        return 0.0
    return learning_rate(config, step - rate.start_step, total_steps - rate.start_step) * rate.scale
