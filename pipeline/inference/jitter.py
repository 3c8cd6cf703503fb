"""Offset jitter: training cuts a weakly aligned clip a little earlier or later, out of the margins its shards keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.weak_schema import JitterConfig
from pipeline.errors import RecipeError
from shards.load.draws import Draw, Purpose
from shards.load.reader import SampleReader
from shards.order.plan import Plan


@dataclass(frozen=True, slots=True)
class Jitter:
    """The offsets of a recipe.

    Args:
        config: how far.
        seed: of the plan.
    """

    config: JitterConfig
    seed: int

    def offset(self, reader: SampleReader, sample: int, showing: int) -> int:
        """Frames by which this showing of a clip is cut later (above 0) or earlier, all offsets of equal chance."""
        row = reader.row(sample)
        if self.config.corpora and row.corpus not in self.config.corpora:
            return 0
        draw = Draw(Purpose.JITTER, self.seed, sample, showing)
        moved, place = draw.chance(self.config.probability), draw.random()
        before, after = (
            math.floor(seconds * row.fps) for seconds in (self.config.before_seconds, self.config.after_seconds)
        )
        return int(place * (before + after + 1)) - before if moved else 0


def check_margins(plan: Plan, config: JitterConfig, fused: bool = False) -> None:
    """Refuse shard sets that keep less around their clips than a cut may move.

    Args:
        plan: of training.
        config: how far.
        fused: whether keypoints are read beside the frames; they are stored without margins.

    Raises:
        RecipeError: too little margin, or none for keypoints; or a corpus that no source has.
    """
    if fused and config.most_seconds:
        raise RecipeError(
            "data.jitter moves the cuts of videos, but this encoder reads keypoints beside them, which are stored"
            " without margins; leave data.jitter out."
        )
    if config.corpora and (unknown := sorted(set(config.corpora) - set(plan.samples.distinct("corpus")))):
        raise RecipeError(
            f"data.jitter.corpora: {', '.join(unknown)} is in no source of data.train; there are"
            f" {', '.join(plan.samples.distinct('corpus'))}."
        )
    for source in plan.sources if config.most_seconds else ():
        kept = source.shard_set.manifest.margin_seconds
        corpora = {source.corpus} if source.corpus else set(source.shard_set.table["corpus"].unique().to_pylist())
        chosen = sorted(corpora & set(config.corpora) if config.corpora else corpora)
        if chosen and kept < config.most_seconds:
            raise RecipeError(
                f"data.jitter moves cuts by up to {config.most_seconds:g} s, but {source.shard_set.dir} keeps"
                f" {f'{kept:g} s' if kept else 'nothing'} around the clips of {', '.join(chosen)}. Build the set from"
                f" its videos again with `slt shards build ... --store margin_seconds={config.most_seconds:g}`, or name"
                " the corpora that have margins in data.jitter.corpora."
            )
