"""Translation of samples in the order of their videos, each with the model's own translations of the sentences before.

A rank takes whole videos, so that ranks need not talk. Within a rank, batches hold sentences of different videos whose
sentences before are all translated; what is no sample of the split is shown as its reference.
"""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.inference.cues import CueReader
from pipeline.inference.generate import GenerationOptions, Prediction, translate
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.prompt import empty_texts, value_of
from shards.errors import DataError
from shards.exchange.previous import IDS
from shards.load.loader import EvalLoader
from shards.load.reader import Reader
from shards.order.items import elements_of
from shards.order.samples import Samples


@dataclass(slots=True)
class Turns:
    """The samples of a rank in turns: those of one turn need no translation of another of it."""

    samples: Samples
    keys: dict[str, int]
    """Sample by ``CORPUS/ID``, of the whole evaluation."""
    column: str
    """Of the sentences before."""
    count: int
    said: dict[int, str] = field(default_factory=dict)
    """Translations by sample."""

    def before(self, sample: int) -> list[int]:
        """The samples of the split that come before one."""
        found = (self.keys.get(key, -1) for key in self.samples.texts(self.column + IDS, sample)[-self.count :])
        return [number for number in found if number >= 0]

    def of_rank(self, rank: int, world_size: int) -> Iterator[list[int]]:
        """The turns of a rank, each to be translated before the next is taken.

        Raises:
            DataError: sentences that come before each other.
        """
        video = {sample: sample for sample in self.keys.values()}

        def first(sample: int) -> int:
            while video[sample] != sample:
                video[sample] = video[video[sample]]
                sample = video[sample]
            return sample

        for sample in video:
            for other in self.before(sample):
                one, two = sorted((first(sample), first(other)))
                video[two] = one
        numbers = {root: number for number, root in enumerate(dict.fromkeys(map(first, video)))}
        mine = [sample for sample in video if numbers[first(sample)] % world_size == rank]
        order = graphlib.TopologicalSorter({sample: self.before(sample) for sample in mine})
        try:
            order.prepare()
        except graphlib.CycleError as error:
            row = self.samples.row(int(error.args[1][0]))
            what = f"{row.corpus}/{row.sample_id} comes before itself in the text column {self.column + IDS!r}"
            fix = "make the columns again with `slt shards previous`"
            raise DataError(what, where=str(self.samples.shard_path(mine[0]).parent), fix=fix) from error
        while order.is_active():
            ready = sorted(order.get_ready())
            yield ready
            order.done(*ready)

    def references(self) -> int:
        """Sentences before that are not in the split, and so shown as references, over the samples of all ranks."""
        return sum(
            key not in self.keys
            for sample in self.keys.values()
            for key in self.samples.texts(self.column + IDS, sample)[-self.count :]
        )

    def previous(self, sample: int) -> list[str]:
        """The sentences before a sample: translations, or references where there is none."""
        texts = self.samples.texts(self.column, sample)[-self.count :]
        keys = self.samples.texts(self.column + IDS, sample)[-self.count :]
        numbers = [self.keys.get(key, -1) for key in keys]
        return [self.said[n] if n >= 0 else text for n, text in zip(numbers, texts, strict=True)]


def turns_of(loader: EvalLoader, keys: Sequence[str], processor: LlavaSltProcessor) -> Turns:
    """The turns of the samples that a loader goes through; ``keys``: `Prediction.key` of all of them, in order."""
    numbers = loader.plan.epoch(0).elements["sample"][: len(keys)].tolist()
    of = processor.options.prompts.previous
    return Turns(loader.plan.samples, dict(zip(keys, numbers, strict=True)), of.column, of.count)


def translate_in_turn(
    model: LlavaSltForConditionalGeneration,
    processor: LlavaSltProcessor,
    loader: EvalLoader,
    turns: Turns,
    options: GenerationOptions,
    on_batch: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Translate this rank's videos; their samples are read in this process.

    Args:
        model: in eval mode.
        processor: with a prompt that shows the sentences before.
        loader: of the samples, its fetch giving clips without cues.
        turns: of the same samples.
        options: search options.
        on_batch: called after each batch with the number of samples done.
    """
    reader, cues = Reader(loader.plan, remote=loader.remote), CueReader(processor.options)
    # a translation may be empty where no sentence before is, and then nothing is shown
    empty = {"previous": "", **empty_texts(processor.options.prompt, processor.options.prompts)}
    predictions: list[Prediction] = []

    def prompted(sample: int) -> list[tuple[object, dict[str, str]]]:
        item = elements_of(np.asarray([sample]), 0, np.asarray([0]))
        row, (clip,) = reader.row(sample), loader.fetch(reader, item)
        shown = cues.cues(turns.samples, sample, row, None)
        shown["previous"] = value_of("previous", turns.previous(sample), empty, reader.where(sample))
        return [(clip, shown)]

    for ready in turns.of_rank(loader.rank, loader.world_size):
        for begin in range(0, len(ready), loader.micro_batch):
            numbers = ready[begin : begin + loader.micro_batch]
            batch = loader.collate([prompted(sample) for sample in numbers])
            found = translate(model, processor, [(batch, numbers)], options, on_batch)  # type: ignore[list-item]
            turns.said.update(zip(numbers, (prediction.hypothesis for prediction in found), strict=True))
            predictions += found
    return predictions
