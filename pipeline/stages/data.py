"""The sources of a recipe as plans, and the loader of the held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.config.schema import DataConfig, Recipe, SourceConfig
from pipeline.dist import SequenceGroup
from pipeline.errors import RecipeError
from shards.format.index import ShardSet
from shards.format.opening import open_shards
from shards.load.loader import EvalLoader
from shards.order.options import PlanOptions, Source
from shards.order.plan import CountTokens, Plan
from shards.schema import UNLABELLED
from shards.storage.access import Remote


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage is built for: one rank of a run."""

    recipe: Recipe
    rank: int
    world_size: int
    device: torch.device
    zero_stage: int = 0
    """ZeRO stage of the engine that will hold the model."""
    sequence: SequenceGroup = field(default_factory=SequenceGroup)
    """The ranks that compute every sequence together; they read the same data."""
    resumed: Mapping[str, Any] | None = None
    """`ExportPlan` of the checkpoint that the run goes on from; None if it starts."""

    @property
    def data_rank(self) -> int:
        """Number of this rank's group: which share of the data it reads."""
        return self.rank // self.sequence.size

    @property
    def data_ranks(self) -> int:
        """Into how many shares the data is cut."""
        return self.world_size // self.sequence.size

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32


@dataclass(frozen=True, slots=True)
class Plans:
    """The data of a run."""

    train: Plan
    held_out: list[Plan]
    """One per source of `data.eval`."""

    def all(self) -> list[Plan]:
        return [self.train, *self.held_out]


def open_set(data: DataConfig, location: str, columns: Sequence[str] = ()) -> ShardSet:
    """A shard set of the recipe, local or in an object store, with the named text columns."""
    return open_shards(location, data.cache_dir, data.storage_options, columns)


def remote(data: DataConfig) -> Remote:
    """How shards in object stores are read."""
    return Remote(data.access, data.cache_gib, dict(data.storage_options))


def open_plan(
    data: DataConfig,
    sources: list[SourceConfig],
    options: PlanOptions,
    count: CountTokens | None = None,
    columns: Sequence[str] = (),
) -> Plan:
    """The order of the given sources; ``count`` as in `Plan`, ``columns`` as in `Source`. Raises RecipeError for clips
    without texts."""
    read = tuple(dict.fromkeys(columns))
    opened = [
        Source(
            open_set(data, s.shards, (*read, *([s.text] if s.text else []))), s.split, s.corpus, s.weight, read, s.text
        )
        for s in sources
    ]
    for source in opened:
        if not source.text and source.shard_set.manifest.options.get(UNLABELLED):
            raise RecipeError(
                f"{source.shard_set.dir} was built without needing texts; say which text column to learn, such as"
                " text: pseudo_label, made by `slt pseudo-label`."
            )
    return Plan(opened, options, count)


def pose_plan(data: DataConfig, sources: Sequence[SourceConfig]) -> Plan | None:
    """The keypoints that the sources name beside their samples; None if none does.

    Raises:
        RecipeError: some sources name keypoints and others do not.
    """
    named = list(dict.fromkeys((s.pose, s.split, s.corpus) for s in sources))
    given = [(pose, split, corpus) for pose, split, corpus in named if pose is not None]
    if not given:
        return None
    if len(given) < len(named):
        without = next(s.shards for s in sources if s.pose is None)
        raise RecipeError(
            f"data: the source {without} names no pose, others do; name the keypoints of all sources, or of none."
        )
    sets = [Source(open_set(data, pose), split, corpus) for pose, split, corpus in given]
    return Plan(sets, PlanOptions(kind="clip", shuffle=False))


def held_out_loader(
    context: StageContext,
    plan: Plan,
    fetch: Callable[..., Any],
    collate: Callable[..., Mapping[str, Any]],
    max_samples: int = 0,
) -> EvalLoader:
    """One pass over a held-out plan: as many items as `train.eval_batches` says, at any world size.

    ``max_samples`` (0 = no limit) is a further limit on the items.
    """
    train, data = context.recipe.train, context.recipe.data
    limits = [limit for limit in (train.eval_batches * train.global_batch, max_samples) if limit]
    return EvalLoader(
        plan, fetch, collate, rank=context.data_rank, world_size=context.data_ranks, micro_batch=train.micro_batch,
        max_samples=min(limits, default=0), workers=data.workers, remote=remote(data),
    )  # fmt: skip
