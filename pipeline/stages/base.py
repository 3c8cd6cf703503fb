"""What a stage is: a model, a loss, a freeze plan and a batch format. The trainer knows nothing else about it.

A stage is complete once it is constructed: `Stage.build` loads what it needs and hands it to the constructor.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, cast

import torch
from torch import nn

from pipeline import dist
from pipeline.config.parts_rules import unreached
from pipeline.config.schema import Recipe, SourceConfig
from pipeline.models.exported import part_of
from pipeline.models.lora import adapted_layers, described
from pipeline.models.sources import Digests, SourceDigests, changed_file, source_folders, source_prefixes
from pipeline.models.warm_start import warm_start
from pipeline.stages.batches import MicroBatch, to_device
from pipeline.stages.data import Plans, StageContext, held_out_loader, open_plan
from pipeline.stages.freezing import apply_freeze_plan, check_held, frozen_names
from shards.order.options import PlanOptions
from shards.order.plan import Plan

Batch = TypeVar("Batch", bound=MicroBatch)
HeldOut = TypeVar("HeldOut", bound=Mapping[str, object])


@dataclass(slots=True)
class LossParts:
    """What one micro-batch adds to the step: a ``loss`` to call backward on, and sums to report."""

    loss: torch.Tensor
    """Scalar; already scaled so that the mean over ranks of the sum over micro-batches is the step's loss."""
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """Detached scalars, summed over micro-batches and ranks by the trainer."""


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Global counts of the step, equal on every rank."""

    valid_tokens: int
    """Label tokens (or samples) of the whole global batch."""
    world_size: int
    maxima: Mapping[str, int] = field(default_factory=dict)
    """The largest of each of `MicroBatch.maxima`, over all micro-batches and ranks."""
    step: int = 0
    """Optimizer steps before this one."""

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
    sources: Digests = field(default_factory=dict)
    """The weight files they were loaded from, as they were when the run started."""
    adapters: list[dict[str, Any]] = field(default_factory=list)
    """`pipeline.models.lora.described`, by full names."""
    initial: Digests = field(default_factory=dict)
    """The files of `model.init_from` that the run started with."""


@dataclass(frozen=True, slots=True)
class ExportCard:
    """What the model card says about an export."""

    what: str
    pipeline_tag: str
    """Of the Hugging Face hub."""
    load: str
    """Python lines that load it from ``FOLDER``."""


class EvaluationStopped(Exception):
    """The run was asked to stop: the current evaluation has no result."""


class Stage(abc.ABC, Generic[Batch]):
    """What all stages have; implement `SummedStage` or `CachedStage`. Methods that run a model: all ranks must call.

    Args:
        context: its rank and run.
        module: what the engine trains, complete; the engine keeps this object. It is frozen as planned.

    Raises:
        RecipeError: the freeze plan leaves nothing to train, or does not fit the model.
    """

    name: ClassVar[str]
    card: ClassVar[ExportCard]
    best_metric: ClassVar[tuple[str, Literal["min", "max"]] | None] = None
    """Metric of `evaluate` that names the best checkpoint."""
    headline: ClassVar[tuple[str, ...]] = ()
    """Held-out metrics shown in the log (all are written)."""
    module: nn.Module

    def __init__(self, context: StageContext, module: nn.Module) -> None:
        self.context, self.module = context, module
        self.recipe, self.device = context.recipe, context.device
        self.started_from = self._warm_start()
        """Part -> folder, of `model.init_from`, whose weights this process has loaded."""
        parts = self.recipe.train.parts
        self.trainable = apply_freeze_plan(module, self.freeze_plan(), parts, unreached(self.recipe))
        """Names of the parameters that train."""
        check_held(module, parts, source_prefixes(self.recipe.model))
        self._folders = source_folders(self.recipe.model, frozen_names(module)) if context.rank == 0 else {}
        self._sources = SourceDigests(self._folders)
        others = {part: folder for part, folder in self.started_from.items() if part not in self._folders}
        self._initial = SourceDigests(others if context.rank == 0 else {})

    def _warm_start(self) -> dict[str, Path]:
        """Load the parts of `model.init_from`; of a run that goes on only those that no checkpoint holds whole."""
        resumed = self.context.resumed
        only = None if resumed is None else {part_of(name) for name in resumed["frozen"]}
        return warm_start(self.module, self.recipe.model, only)

    # -- before there is a model -----------------------------------------------------------------------------------
    @classmethod
    @abc.abstractmethod
    def plan_options(cls, recipe: Recipe, train: bool) -> PlanOptions:
        """How sources become items."""

    @classmethod
    def plan(cls, recipe: Recipe, sources: list[SourceConfig], train: bool) -> Plan:
        """The order of the given sources."""
        return open_plan(recipe.data, sources, cls.plan_options(recipe, train), columns=cls.text_columns(recipe, train))

    @classmethod
    def text_columns(cls, recipe: Recipe, train: bool) -> tuple[str, ...]:
        """The text columns that every source must have (`shards.format.text_columns`): `plan.samples.texts` gives
        their texts, and a change of their content is a change of the data."""
        return ()

    @classmethod
    def plans(cls, recipe: Recipe) -> Plans:
        """All data of a run."""
        train = cls.plan(recipe, recipe.data.train, train=True)
        return Plans(train, [cls.plan(recipe, [source], train=False) for source in recipe.data.eval])

    @classmethod
    @abc.abstractmethod
    def build(cls, context: StageContext, plans: Plans) -> Self:
        """The stage with its model, on every rank. Refuses shard sets that do not fit the model, and does
        the one-time work before training (caches).

        Runs inside the ZeRO-3 context if the recipe asks for it. Raises RecipeError.
        """

    # -- model -----------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def freeze_plan(self) -> dict[str, bool]:
        """Top-level part of the module -> whether it trains. Every parameter's first name part must be listed;
        already frozen parameters (a frozen backbone) stay frozen."""

    # -- data ------------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def fetch(self, train: bool) -> Callable[..., Any]:
        """Picklable ``fetch(reader, item)`` run in loader workers: item -> list of raw samples.

        ``train``: whether for training, which may change samples, or for held-out data.
        """

    @abc.abstractmethod
    def collate(self) -> Callable[[list[list[Any]]], Batch]:
        """Picklable ``collate(items)`` run in loader workers: per item its raw samples -> a micro-batch."""

    def held_out(
        self,
        sources: list[SourceConfig],
        collate: Callable[[list[list[Any]]], HeldOut],
        stop_requested: Callable[[], bool],
        max_samples: int = 0,
    ) -> Iterator[tuple[HeldOut, list[int]]]:
        """Held-out micro-batches on the device, each with the numbers of its samples.

        All ranks get equally many (`EvalLoader.padded`): the result of one without samples is dropped. A rank that is
        asked to stop ends it for all, because an evaluation may take longer than the time left to save. Every batch
        is one collective; all ranks must call.

        Args:
            stop_requested: whether this rank was asked to stop.
            max_samples: as in `held_out_loader`.

        Raises:
            EvaluationStopped: on all ranks before the same batch.
        """
        plan = self.plan(self.recipe, sources, train=False)
        loader = held_out_loader(self.context, plan, self.fetch(train=False), collate, max_samples)
        for batch, samples in loader.padded():
            if dist.any_rank(stop_requested()):
                raise EvaluationStopped
            yield to_device(cast(HeldOut, batch), self.device), samples

    # -- training --------------------------------------------------------------------------------------------------
    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        """Global sums of a step -> metrics (`loss` first)."""
        return sums

    def flops_per_step(self, batches: list[Batch]) -> float:
        """Model FLOPs (forward + backward) of this rank's micro-batches; 0 if unknown."""
        del batches
        return 0.0

    # -- held-out --------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def evaluate(self, model: Callable[..., Any], stop_requested: Callable[[], bool]) -> dict[str, float]:
        """Metrics on the recipe's held-out sources; equal on every rank.

        Args:
            model: calls the module with the engine's hooks, as in `probe`.
            stop_requested: for `held_out`.

        Raises:
            EvaluationStopped: as `held_out` does.
        """

    # -- export ----------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def probe(self, model: Callable[..., Any]) -> dict[str, torch.Tensor]:
        """Inputs and live outputs on a fixed seeded input, stored in the checkpoint: the oracle of the export."""

    @abc.abstractmethod
    def write_export_files(self, folder: Path) -> ExportPlan:
        """Write config, tokenizer and processor files; returns `export_plan`. Only rank 0 calls."""

    def export_plan(self, prefix: str, tied: list[str]) -> ExportPlan:
        """Which parameters are exported, and where those come from that the checkpoint leaves out."""
        resumed, sources, adapters = self.context.resumed, self._sources.get(), described(adapted_layers(self.module))
        initial = {part: files for part, files in sources.items() if part in self.started_from} | self._initial.get()
        if resumed is not None:
            initial = resumed.get("initial", {})
        return ExportPlan(prefix, tied, frozen_names(self.module), sources, adapters, initial)

    def changed_source(self, recorded: Digests) -> str:
        """The first file of frozen parts that is not what an earlier start of the run loaded; empty if there is none.
        Only rank 0 calls. Waits until the files are read."""
        return changed_file(recorded, self._sources.get(), self._folders)

    @classmethod
    @abc.abstractmethod
    def exported(cls, folder: Path, probe: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The outputs of `probe` again, from an export loaded as a user would load it."""


class SummedStage(Stage[Batch]):
    """A stage whose loss is a sum over tokens or samples: micro-batches are independent."""

    @abc.abstractmethod
    def loss(self, model: Callable[..., Any], batch: Batch, normaliser: Normaliser) -> LossParts:
        """Forward one micro-batch."""


class CachedStage(Stage[Batch]):
    """A stage whose loss needs the whole global batch at once (negatives): features are cached, then replayed."""

    @abc.abstractmethod
    def features(self, model: Callable[..., Any], batch: Batch) -> dict[str, torch.Tensor]:
        """The tensors that the loss needs, for one micro-batch."""

    def for_replay(self, batch: Batch, features: dict[str, torch.Tensor]) -> Batch:
        """What `features` gets in the second pass; may take tensors out of the first pass's features and put them in
        the place of inputs, so that nothing without weights to train is computed twice."""
        del features
        return batch

    @abc.abstractmethod
    def contrast(
        self, features: list[dict[str, torch.Tensor]], batches: list[Batch], normaliser: Normaliser
    ) -> LossParts:
        """The loss over this rank's share of the global batch."""


AnyStage = SummedStage[Any] | CachedStage[Any]
