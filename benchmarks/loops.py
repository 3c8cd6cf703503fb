"""One stage of a recipe, trained in this process by our trainer and by what it is measured against.

`ours` is the trainer with its loader, metrics and agreement between ranks. `bare` is the shortest DeepSpeed loop over
the same model, loss, configuration and batches, which it holds in memory. `hugging_face` is Hugging Face's Trainer with
the same DeepSpeed configuration over the same samples, in memory, too; stage 1 runs as its users run it (the model's
own loss, SDPA, positions that restart per document), the other stages through our model and loss. `plain` is stage 1
without DeepSpeed: bf16 weights, float32 master copies, torch's AdamW.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.agreement import agree
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.training import Training
from pipeline.stages.base import AnyStage, CachedStage, Normaliser
from pipeline.stages.batches import to_device
from pipeline.stages.continued_pretraining import ContinuedPretraining
from pipeline.stages.data import Plans, StageContext


@dataclass(frozen=True)
class Run:
    """What is trained, and how it is timed."""

    recipe: str
    sets: list[str]
    device: str
    block: int = 5
    """Steps timed together; the first block of a run is warm-up."""


@dataclass
class Timing:
    """What a loop took."""

    seconds: list[float] = field(default_factory=list)
    """Per step, one figure per block."""
    tokens: list[int] = field(default_factory=list)
    """Label tokens (or samples) of the loss, per step, over all ranks."""
    flops: list[float] = field(default_factory=list)
    """Of this rank, per step; 0 where the stage does not know."""
    wait_seconds: float = 0.0
    """For the loader, in all steps together."""
    peak_gib: float | None = None
    """Most memory that tensors held; None on the CPU."""

    def per_step(self, values: list[Any]) -> float:
        return sum(values) / max(len(values), 1)


class Clock:
    """Times blocks of steps, all ranks together, the device's work included."""

    def __init__(self, run: Run, timing: Timing) -> None:
        self.run, self.timing, self.steps = run, timing, 0
        self.begin = time.perf_counter()

    def start(self) -> None:
        self._wait()
        self.steps, self.begin = 0, time.perf_counter()

    def step(self) -> None:
        self.steps += 1
        if self.steps % self.run.block == 0:
            self._wait()
            now = time.perf_counter()
            self.timing.seconds.append((now - self.begin) / self.run.block)
            self.begin = now

    def _wait(self) -> None:
        if self.run.device != "cpu":
            torch.cuda.synchronize()
        dist.barrier()


class ClockObserver(Observer):
    """The clock inside our trainer; the last observer, so that what the others do counts."""

    def __init__(self, training: Training, run: Run, timing: Timing) -> None:
        super().__init__(training)
        self.clock, self.timing = Clock(run, timing), timing

    def on_start(self, wishes: Wishes) -> dict[str, float]:
        self.clock.start()
        return {}

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
        self.clock.step()
        self.timing.tokens.append(step.valid_tokens)
        self.timing.flops.append(self.training.stage.flops_per_step(list(step.batch.micro_batches)))
        self.timing.wait_seconds += step.batch.wait_seconds
        return {}


def resolved_recipe(recipe: str, sets: list[str]) -> ResolvedRecipe:
    """The recipe with its run directory, behind joining the process group."""
    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve

    resolved = resolve(load_recipe(recipe, sets), dist.init().world_size)
    Path(resolved.recipe.run_dir).mkdir(parents=True, exist_ok=True)
    return resolved


def torch_device(name: str) -> torch.device:
    """The first of its kind, as a rank's device is named (also on a CPU)."""
    return torch.device(name, 0)


def make_training(recipe: str, sets: list[str], device: str) -> Training:
    """A run of the recipe that stands before its first step."""
    from pipeline.engine.phases import Phases
    from pipeline.engine.prepare import prepare
    from pipeline.engine.signals import StopFlag
    from pipeline.stages.registry import stage_class

    resolved = resolved_recipe(recipe, sets)
    kind, ranks = stage_class(resolved.recipe.stage), dist.ranks_from_environment()
    if device != "cpu" and kind is ContinuedPretraining and _zero_stage(resolved) != 3:
        kind = DrawnOnDevice
    return prepare(resolved, kind, ranks, torch_device(device), StopFlag(), Phases())


class DrawnOnDevice(ContinuedPretraining):
    """Stage 1 whose random weights are drawn where they will be: seconds in place of a minute for billions."""

    __module__ = ContinuedPretraining.__module__  # what loader workers import ahead

    @classmethod
    def build(cls, context: StageContext, plans: Plans) -> Self:
        with torch.device(context.device):
            return super().build(context, plans)


def _zero_stage(resolved: ResolvedRecipe) -> int:
    return int(resolved.ds_config["zero_optimization"]["stage"])


def fit(training: Training, first: list[Observer], last: list[Observer], save: bool = False) -> None:
    """Train with more observers before and after the trainer's own; without checkpoints unless ``save``."""
    from pipeline.engine.observers.registry import observers_of
    from pipeline.engine.observers.save import Save
    from pipeline.engine.sinks.registry import sinks_of
    from pipeline.engine.trainer import Trainer

    own = [observer for observer in observers_of(training) if save or not isinstance(observer, Save)]
    Trainer(training, [*first, *own, *last], sinks_of(training)).fit()
    training.engine.destroy()


def ours(run: Run) -> Timing:
    """Our trainer."""
    reset_memory(run.device)
    training, timing = make_training(run.recipe, run.sets, run.device), Timing()
    reset_memory(run.device)  # what building took (a text encoder, now gone) is no part of the peak
    fit(training, [], [ClockObserver(training, run, timing)])
    timing.peak_gib = peak_gib(run.device)
    return timing


def bare(run: Run, change: Callable[[nn.Module], Any] | None = None) -> Timing:
    """The shortest DeepSpeed loop. A contrastive stage takes its step from one micro-batch.

    Args:
        change: called with the engine's module before the first step.
    """
    reset_memory(run.device)
    training, timing = make_training(run.recipe, run.sets, run.device), Timing()
    reset_memory(run.device)
    if change is not None:
        change(training.engine.module)
    engine, stage = training.engine.engine, training.stage
    steps: list[tuple[Normaliser, list[Any]]] = []
    for _, batch in zip(range(training.total_steps), training.loader, strict=False):
        normaliser = agree(training, batch, []).normaliser
        timing.tokens.append(normaliser.valid_tokens)
        timing.flops.append(stage.flops_per_step(list(batch.micro_batches)))
        steps.append((normaliser, [to_device(micro, training.device) for micro in batch.micro_batches]))
    clock = Clock(run, timing)
    clock.start()
    for normaliser, micros in steps:
        for loss in _losses(stage, engine, micros, normaliser):
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
        clock.step()
    timing.peak_gib = peak_gib(run.device)
    training.engine.destroy()
    return timing


def _losses(stage: AnyStage, model: Any, micros: list[Any], normaliser: Normaliser) -> Iterator[torch.Tensor]:
    if isinstance(stage, CachedStage):
        (micro,) = micros
        yield stage.contrast([stage.features(model, micro)], micros, normaliser).loss
        return
    for micro in micros:
        yield stage.loss(model, micro, normaliser).loss


def plain(run: Run) -> Timing:
    """Stage 1 in one process without DeepSpeed."""
    reset_memory(run.device)
    resolved, timing = resolved_recipe(run.recipe, run.sets), Timing()
    stage, batches = _stage_and_batches(resolved, run.device, lambda stage: stage.collate())
    module = stage.module.to(run.device).train()
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    masters = [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=resolved.recipe.train.optimizer.lr, fused=run.device != "cpu")
    steps = []
    for micros in batches:
        valid = sum(int(micro["valid_tokens"]) for micro in micros)
        largest = {name: max(micro["maxima"][name] for micro in micros) for name in micros[0]["maxima"]}
        timing.tokens.append(valid)
        timing.flops.append(stage.flops_per_step(micros))
        steps.append((Normaliser(valid, 1, largest), [to_device(micro, torch_device(run.device)) for micro in micros]))
    clock = Clock(run, timing)
    clock.start()
    for normaliser, micros in steps:
        for loss in _losses(stage, module, micros, normaliser):
            loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, resolved.recipe.train.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        clock.step()
    timing.peak_gib = peak_gib(run.device)
    return timing


def _stage_and_batches(
    resolved: ResolvedRecipe, device: str, collate: Callable[[AnyStage], Any]
) -> tuple[AnyStage, list[list[Any]]]:
    """The stage without an engine, and the micro-batches of every step of all ranks."""
    from pipeline.stages.registry import stage_class
    from shards.load.loader import StepLoader
    from shards.load.requests import LoaderOptions

    recipe = resolved.recipe
    kind, ranks = stage_class(recipe.stage), dist.ranks_from_environment()
    zero = _zero_stage(resolved)
    plans = kind.plans(recipe)
    context = StageContext(recipe, ranks.rank, ranks.world_size, torch_device(device), zero)
    with torch.device(device):  # random weights are drawn far faster on a GPU
        stage = kind.build(context, plans)
    options = LoaderOptions(0, 1, recipe.train.global_batch, recipe.train.micro_batch)
    loader = StepLoader(plans.train, stage.fetch(train=True), collate(stage), options)
    steps = recipe.train.steps
    assert steps is not None
    return stage, [list(batch.micro_batches) for _, batch in zip(range(steps), loader, strict=False)]


def reset_memory(device: str) -> None:
    """Give back what an earlier measurement held, and forget its peak."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    """Most memory that tensors held since `reset_memory`; None on the CPU."""
    return None if device == "cpu" else round(torch.cuda.max_memory_allocated() / 2**30, 2)
