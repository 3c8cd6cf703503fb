"""From a resolved recipe and a stage to a running DeepSpeed engine, checked against the recipe."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.config.rates import Rate, rates_of
from pipeline.config.resolve import ResolvedRecipe
from pipeline.config.train_schema import OptimizerConfig
from pipeline.engine.compiling import compile_model
from pipeline.engine.gate import finite_or_nothing, gate_steps
from pipeline.engine.own_time import OwnTime
from pipeline.engine.schedule import learning_rate, scheduled_rate
from pipeline.engine.wait_once import wait_once
from pipeline.errors import RecipeError
from pipeline.stages.base import AnyStage
from pipeline.stages.freezing import check_layers

logger = logging.getLogger(__name__)


class TrainEngine:
    """A DeepSpeed engine with the learning-rate rule of the recipe; the only object that steps weights."""

    def __init__(
        self,
        engine: Any,
        device: torch.device,
        config: OptimizerConfig,
        total_steps: int,
        keep_alive: object,
        rates: Sequence[Rate] = (),
    ) -> None:
        """``rates``: of the optimizer's groups, in their order; none if all follow ``config`` alone."""
        self.engine = engine
        self.gate = gate_steps(engine)
        """Decides on every step, and knows of the last one."""
        self.own_time = OwnTime(device)
        """Of forward passes in training."""
        self.config = config
        self.total_steps = total_steps
        self.rates = list(rates) or [Rate()] * len(engine.optimizer.param_groups)
        self.part_rates: dict[str, float] = {}
        """Part of `train.parts` -> the highest rate of its last step."""
        # transformers looks the live ZeRO-3 configuration up through a weak reference
        self._keep_alive = keep_alive

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @property
    def forward(self) -> Callable[..., Any]:
        """Calls the model with DeepSpeed's hooks."""
        return self.engine

    @property
    def training_forward(self) -> Callable[..., Any]:
        """The same; its time counts as `own_time`."""
        return self.own_time.measured(self.engine)

    def set_learning_rate(self, step: int) -> float:
        """Set every group's rate for optimizer step ``step``; returns that of parts without a rate of their own."""
        for rate, group in zip(self.rates, self.engine.optimizer.param_groups, strict=True):
            group["lr"] = scheduled_rate(self.config, rate, step, self.total_steps)
        of_parts: dict[str, float] = {}
        for rate, group in zip(self.rates, self.engine.optimizer.param_groups, strict=True):
            if rate.part:
                of_parts[rate.part] = max(of_parts.get(rate.part, 0.0), group["lr"])
        self.part_rates = of_parts
        return learning_rate(self.config, step, self.total_steps)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of a loss that is already normalised over the whole global batch; of one that is not
        finite, NaN."""
        self.engine.backward(finite_or_nothing(loss), scale_wrt_gas=False)

    def step(self) -> None:
        """Call after every micro-batch; DeepSpeed updates weights on the last one only."""
        self.engine.step()

    def destroy(self) -> None:
        self.engine.destroy()


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """DeepSpeed prints its whole configuration at INFO; we log what matters ourselves."""
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "deepspeed")]
    levels = [entry.level for entry in loggers]
    for entry in loggers:
        entry.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for entry, level in zip(loggers, levels, strict=True):
            entry.setLevel(level)


def parameter_groups(
    module: nn.Module, weight_decay: float, rates: Mapping[str, Rate] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters by rate, with their names; biases, norms and scales (fewer than two dimensions) are not
    decayed.

    Args:
        rates: of every parameter by name; None = one for all.
    """
    groups: dict[tuple[Rate, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = Rate() if rates is None else rates[name]
            for decayed in (True, False):  # decayed parameters of a rate come first, whichever the model has first
                decay = weight_decay if decayed else 0.0
                groups.setdefault((rate, decayed), {"params": [], "names": [], "weight_decay": decay})
            group = groups[rate, len(getattr(parameter, "ds_shape", parameter.shape)) >= 2]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def start_engine(
    build: Callable[[], AnyStage], resolved: ResolvedRecipe, total_steps: int
) -> tuple[AnyStage, TrainEngine]:
    """Build the stage (its model partitioned from the start under ZeRO-3) and initialise DeepSpeed.

    Args:
        build: called while transformers knows of ZeRO-3.

    Raises:
        RecipeError: the engine's batch sizes, precision, ZeRO stage or clipping differ from the recipe's.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config = resolved.ds_config
    zero_stage = int(config["zero_optimization"]["stage"])
    keep_alive = HfDeepSpeedConfig(config) if zero_stage == 3 else None
    stage = build()
    module = stage.module
    trainable = stage.trainable
    check_layers(module)
    total = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    training = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
    logger.info(
        "training %s of %s parameters in %d tensors: %s",
        f"{training:,}", f"{total:,}", len(trainable), ", ".join(sorted({n.split(".")[0] for n in trainable})),
    )  # fmt: skip
    optimizer_config = resolved.recipe.train.optimizer
    rates = rates_of([n for n, _ in module.named_parameters()], resolved.recipe.train.parts, optimizer_config.lr)
    groups = parameter_groups(module, optimizer_config.weight_decay, rates)
    # fused: one pass over weights, gradients and moments, on CUDA and on the CPU (offloaded states)
    optimizer = torch.optim.AdamW(
        groups,
        lr=optimizer_config.lr, betas=optimizer_config.betas, eps=optimizer_config.eps, fused=True,
    )  # fmt: skip
    with quiet_deepspeed():
        engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    check_engine(engine, resolved)
    wait_once(engine.optimizer)
    compile_model(engine, resolved.recipe.train.compile, stage.device)
    assert engine.module is module, "a stage keeps the module that the engine trains"
    of_groups = [rates[group["names"][0]] for group in groups]
    return stage, TrainEngine(engine, stage.device, optimizer_config, total_steps, keep_alive, of_groups)


def check_engine(engine: Any, resolved: ResolvedRecipe) -> None:
    """Compare DeepSpeed's settings with the recipe's."""
    train = resolved.recipe.train
    pairs = {
        # to DeepSpeed a slice of a sequence is an item of its own
        "train.global_batch": (train.global_batch * train.sequence_parallel, engine.train_batch_size()),
        "train.micro_batch": (train.micro_batch, engine.train_micro_batch_size_per_gpu()),
        "accumulation_steps": (resolved.accumulation_steps, engine.gradient_accumulation_steps()),
        "train.precision bf16": (train.precision == "bf16", engine.bfloat16_enabled()),
        "zero stage": (int(resolved.ds_config["zero_optimization"]["stage"]), engine.zero_optimization_stage()),
        "train.optimizer.clip_norm": (train.optimizer.clip_norm, engine.gradient_clipping()),
    }
    wrong = [f"{name}: recipe {ours}, engine {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if wrong:
        raise RecipeError("DeepSpeed did not take the recipe's values:\n  " + "\n  ".join(wrong))
