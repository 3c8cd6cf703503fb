"""What a stage is: a model, a loss, a freeze plan and what a batch holds. The trainer knows nothing else about it.

Shape suffixes: B samples, L text tokens, D width, E embedding.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pipeline import dist
from pipeline.config.schema import Recipe, SourceConfig
from pipeline.errors import RecipeError
from pipeline.models.training_texts import tell_known_texts
from shards.format.index import ShardSet
from shards.format.opening import open_shards
from shards.load.loader import EvalLoader
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.storage.access import Remote

logger = logging.getLogger(__name__)

MicroBatch = dict[str, Any]


@dataclass(slots=True)
class LossParts:
    """What one micro-batch adds to the step: ``loss`` to call backward on and sums to report."""

    loss: torch.Tensor
    """Scalar; already divided so that the mean over ranks of the sum over micro-batches is the step's loss."""
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """Detached scalars, summed over micro-batches and ranks by the trainer."""


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Global counts of the step, equal on every rank."""

    valid_tokens: int
    """Label tokens (or samples) of the whole global batch."""
    world_size: int

    def scale(self, loss_sum: torch.Tensor) -> torch.Tensor:
        """Local sum -> this micro-batch's part of the global mean, given that gradients are averaged over ranks."""
        return loss_sum * (self.world_size / max(self.valid_tokens, 1))


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """How checkpoint tensors become an exported model."""

    prefix: str
    """Parameters below this prefix are the model (the prefix is dropped); others go to heads.safetensors."""
    tied: list[str]
    """Names that share another parameter's storage and are not written."""
    frozen: list[str]
    """Full names of frozen parameters, read from where the recipe loaded them."""


class EvaluationStopped(Exception):
    """The run was asked to stop: the evaluation that is under way has no result."""


class Stage(abc.ABC):
    """What all stages have; implement `SummedStage` or `CachedStage`. Methods that run a model: all ranks must call."""

    name: ClassVar[str]
    best_metric: ClassVar[tuple[str, Literal["min", "max"]] | None] = None
    """Metric of `evaluate` that names the best checkpoint."""
    headline: ClassVar[tuple[str, ...]] = ()
    """Held-out metrics shown in the log (all are written)."""

    def __init__(self, recipe: Recipe, rank: int, world_size: int, device: torch.device) -> None:
        self.recipe = recipe
        self.rank, self.world_size, self.device = rank, world_size, device
        self.dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
        self.zero_stage = 0
        """ZeRO stage of the engine; set by the trainer before `build`."""
        self.stop_requested: Callable[[], bool] = lambda: False
        """Whether this rank was asked to stop; set by the trainer."""

    # -- model ---------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def build(self) -> nn.Module:
        """The module the engine trains; built inside the ZeRO-3 context where the recipe asks for it."""

    @abc.abstractmethod
    def freeze_plan(self) -> dict[str, bool]:
        """Top-level part of the module -> whether it trains. Every parameter's first name part must be listed;
        parameters that `build` returned frozen (a frozen backbone) stay frozen."""

    def attach(self, module: Any) -> None:
        """Called once with the module the engine holds (sizes for FLOPs)."""
        del module

    # -- data ----------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def plan_options(self, train: bool) -> PlanOptions:
        """How the sources become items."""

    @abc.abstractmethod
    def fetch(self) -> Callable[..., Any]:
        """Picklable ``fetch(reader, item)`` run in loader workers: item -> list of raw samples."""

    @abc.abstractmethod
    def collate(self) -> Callable[..., MicroBatch]:
        """Picklable ``collate(items)`` run in loader workers, per item its raw samples; the result holds `valid_tokens`
        and `samples` (int, of the micro-batch)."""

    def check_data(self, plan: Plan) -> None:
        """Refuse shard sets that do not fit the model, before the first step. Raises RecipeError."""
        del plan

    def prepare(self, plans: list[Plan]) -> None:
        """Work before training that every rank takes part in (caches).

        Args:
            plans: of the training data, then of each held-out source.
        """
        if self.rank == 0:
            texts = [text for plan in plans[1:] for text in plan.samples.column("text").to_pylist()]
            tell_known_texts(self.text_model(), texts, self.recipe.data.storage_options)

    def text_model(self) -> str | None:
        """Folder of the model that reads or writes the texts this stage is scored on; None where there is none."""
        return None

    def plan(self, sources: list[SourceConfig], train: bool) -> Plan:
        """The order of the given sources."""
        return Plan(
            [Source(self.open_shards(s.shards), s.split, s.corpus, s.weight) for s in sources],
            self.plan_options(train),
        )

    def held_out(
        self, sources: list[SourceConfig], collate: Callable[..., MicroBatch] | None = None, max_samples: int = 0
    ) -> EvalLoader:
        """One pass over held-out sources, as many items as `train.eval_batches` says, whatever the world size.

        ``collate`` replaces the stage's own; ``max_samples`` (0 = no limit) is a further limit on the items.
        """
        train = self.recipe.train
        limits = [limit for limit in (train.eval_batches * train.global_batch, max_samples) if limit]
        return EvalLoader(
            self.plan(sources, train=False), self.fetch(), collate or self.collate(), rank=self.rank,
            world_size=self.world_size, micro_batch=train.micro_batch, max_samples=min(limits, default=0),
            workers=self.recipe.data.workers, remote=self.remote(),
        )  # fmt: skip

    def held_out_batches(self, loader: EvalLoader) -> Iterator[tuple[MicroBatch, list[int]]]:
        """`EvalLoader.padded`, until a rank is asked to stop: an evaluation may take longer than the time there is to
        save. Every batch is one collective; all ranks must call.

        Raises:
            EvaluationStopped: on all ranks before the same batch.
        """
        for batch, samples in loader.padded():
            if dist.any_rank(self.stop_requested(), self.device):
                raise EvaluationStopped
            yield batch, samples

    def open_shards(self, location: str) -> ShardSet:
        """A shard set of the recipe, local or in an object store."""
        data = self.recipe.data
        return open_shards(location, data.cache_dir, data.storage_options)

    def remote(self) -> Remote:
        """How shards in object stores are read."""
        data = self.recipe.data
        return Remote(data.access, data.cache_gib, dict(data.storage_options))

    # -- training ------------------------------------------------------------------------------------------------
    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        """Global sums of a step -> metrics (`loss` first)."""
        return sums

    # -- held-out ------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def evaluate(self, model: Callable[..., Any], module: Any) -> dict[str, float]:
        """Metrics on the recipe's held-out sources; equal on every rank."""

    def flops_per_step(self, batches: list[MicroBatch]) -> float:
        """Model FLOPs (forward + backward) of this rank's micro-batches; 0 where unknown."""
        del batches
        return 0.0

    # -- export --------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def probe(self, model: Callable[..., Any]) -> dict[str, torch.Tensor]:
        """Inputs and live outputs on a fixed seeded input, stored in the checkpoint: the oracle of the export."""

    @abc.abstractmethod
    def write_export_files(self, module: Any, folder: Path) -> ExportPlan:
        """Write config, tokenizer and processor files; say which parameters the exported weights consist of."""


class SummedStage(Stage):
    """A stage whose loss is a sum over tokens or samples: micro-batches are independent."""

    @abc.abstractmethod
    def loss(self, model: Callable[..., Any], batch: MicroBatch, normaliser: Normaliser) -> LossParts:
        """Forward one micro-batch."""


class CachedStage(Stage):
    """A stage whose loss needs the whole global batch at once (negatives): features are cached, then replayed."""

    @abc.abstractmethod
    def features(self, model: Callable[..., Any], batch: MicroBatch) -> dict[str, torch.Tensor]:
        """The tensors the loss is made of, for one micro-batch."""

    @abc.abstractmethod
    def contrast(self, features: list[dict[str, torch.Tensor]], batches: list[MicroBatch]) -> LossParts:
        """The loss over this rank's share of the global batch."""


AnyStage = SummedStage | CachedStage


def apply_freeze_plan(module: nn.Module, plan: dict[str, bool]) -> list[str]:
    """Set requires_grad by part and return the names of the trainable parameters.

    A parameter that is already frozen inside a trainable part (a frozen backbone) stays frozen.

    Raises:
        RecipeError: nothing is left to train.
    """
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(plan[name.split(".")[0]] and parameter.requires_grad)
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise RecipeError(f"the freeze plan {plan} leaves no parameter to train")
    return trainable


def check_layers(module: nn.Module) -> None:
    """Refuse layers whose output for one sample depends on the others beside it: the loss would change with the
    micro-batch and the number of ranks. Fixed statistics, as a frozen part has, are fine.

    Raises:
        RecipeError: a batch normalisation (or its kind) that would use the statistics of the batch.
    """
    module.train()  # what is frozen stays in eval mode by itself
    mixing = [
        name
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm | _InstanceNorm)
        and (part.training or part.running_mean is None)
        and (isinstance(part, _BatchNorm) or part.track_running_stats)
    ]
    if not mixing:
        return
    layer = module.get_submodule(mixing[0])
    fix = "take a model with layer norms, such as a ViT or ConvNeXt"
    if layer.training and mixing[0].startswith("visual."):
        fix = f"freeze the part (model.visual.backbone.train: frozen), so that it uses its stored statistics, or {fix}"
    elif not layer.training:
        fix = f"it is frozen, but stores no statistics to use instead; {fix}"
    raise RecipeError(
        f"{len(mixing)} layers mix the samples of a micro-batch, the first is {mixing[0]} ({type(layer).__name__}):"
        f" losses would depend on train.micro_batch and the number of ranks. To mend: {fix}."
    )


def frozen_names(module: nn.Module) -> list[str]:
    """Names of frozen parameters: what a checkpoint leaves out."""
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


def frozen_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Saved buffers of modules that train nothing, such as the statistics of a frozen batch normalisation."""
    found = []
    for prefix, owner in module.named_modules():
        if any(parameter.requires_grad for parameter in owner.parameters(recurse=False)):
            continue
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                found.append((f"{prefix}.{name}", buffer))
    return found


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of a (nested) micro-batch moved without blocking; everything else as it is."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch


def move_all(batches: Iterator[MicroBatch] | list[MicroBatch], device: torch.device) -> list[MicroBatch]:
    return [to_device(batch, device) for batch in batches]


def probe_frames(pixels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two seeded random clips of unlike length: uint8 [N, H, W, 3] packed, lengths [2]."""
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.tensor([9, 6])
    frames_NHWC = torch.randint(0, 256, (15, pixels, pixels, 3), generator=generator, dtype=torch.uint8)
    return frames_NHWC.to(device), lengths_B.to(device)
