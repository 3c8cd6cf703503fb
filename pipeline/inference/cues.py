"""What a prompt shows of each sample of a plan: from its index row and its text columns, in loader processes.

In training a cue may be left out, and examples change, by random numbers that (seed, sample, showing) decide
(:mod:`shards.load.draws`). In evaluations nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.prompt_schema import ANNOTATION, PromptsConfig, cues_of, fields_of
from pipeline.models.processing import LlavaSltProcessor, ProcessorOptions
from pipeline.models.prompt import Cues, empty_texts, example_text, language_name, value_of
from shards.errors import DataError
from shards.load.draws import Draw, Purpose
from shards.load.reader import SampleReader
from shards.order.items import Elements
from shards.order.plan import Plan
from shards.order.samples import Samples
from shards.schema import IndexRow, text_hash

Prompted = tuple[Any, Cues]
"""A clip, and what the prompt shows of its sample."""
_CODES = ("language", "sign_language")


@dataclass(frozen=True, slots=True)
class CueReader:
    """The cues of samples, as the prompt of a processor shows them."""

    options: ProcessorOptions

    def cues(self, samples: Samples, sample: int, row: IndexRow, draw: Draw | None) -> dict[str, str]:
        """The text in every field of the prompt but the video's.

        Args:
            samples: of the plan, whose sources read the text columns of the prompt.
            sample: its number.
            row: its index row.
            draw: decides in training what is left out and which examples are shown; None = evaluation.

        Raises:
            DataError: the sample lacks a cue, and no text is given for that; names the sample.
        """
        shown = self.whole(samples, sample, row, draw is not None, draw)
        if draw is None:
            return shown
        empty = empty_texts(self.options.prompt, self.options.prompts)
        prompts = self.options.prompts
        for name, of in (("previous", prompts.previous), ("gloss", prompts.gloss), ("example", prompts.example)):
            # drawn also for what the prompt does not show: a change of the prompt changes no other cue
            if draw.chance(of.dropout) and name in shown:
                shown[name] = empty[name]
        return shown

    def whole(
        self, samples: Samples, sample: int, row: IndexRow, train: bool, draw: Draw | None = None
    ) -> dict[str, str]:
        """``cues`` before any is left out; without a draw with the first examples of the pool."""
        prompts, where = self.options.prompts, f"{samples.shard_path(sample)}:{row.key} ({row.corpus}/{row.sample_id})"
        empty, found = empty_texts(self.options.prompt, prompts), dict[str, str]()
        texts: dict[str, Callable[[], list[str]]] = {
            "previous": lambda: self._previous(samples, sample),
            "gloss": lambda: self._gloss(samples, sample, row, train),
            "example": lambda: self.examples(row.text, draw),
        }
        for name in cues_of(self.options.prompt):
            if name in _CODES:
                found[name] = language_name(name, getattr(row, name), prompts, where)
            else:
                found[name] = value_of(name, texts[name](), empty, where)
        return found

    def _previous(self, samples: Samples, sample: int) -> list[str]:
        of = self.options.prompts.previous
        return samples.texts(of.column, sample)[-of.count :]

    def _gloss(self, samples: Samples, sample: int, row: IndexRow, train: bool) -> list[str]:
        prompts = self.options.prompts
        if not train and prompts.gloss.held_out == "empty":
            return []
        return [gloss_of(prompts, samples, sample, row)]

    def examples(self, text: str, draw: Draw | None = None) -> list[str]:
        """Examples for a sample with this text, never that text itself: the first of the pool, or drawn ones."""
        pool = self.options.examples
        order = range(len(pool)) if draw is None else np.argsort(draw.randoms(len(pool)), kind="stable").tolist()
        own = text_hash(text)
        others = [pool[number][0] for number in order if text_hash(pool[number][1]) != own]
        return others[: self.options.prompts.example.count]


@dataclass(frozen=True, slots=True)
class StatedCues:
    """What a caller says of a video that is no sample."""

    language: str = ""
    """Code of the language to translate to; needed where the prompt names several."""
    sign_language: str = ""
    previous: tuple[str, ...] = ()
    """Sentences before, the nearest last."""


def stated_cues(processor: LlavaSltProcessor, stated: StatedCues, before: Sequence[str] = ()) -> dict[str, str]:
    """The cues of a video that is no sample; ``before``: sentences that were translated before it.

    Raises:
        DataError: the prompt shows something that is not stated and may not be empty.
    """
    options = processor.options
    prompts, empty, where = options.prompts, empty_texts(options.prompt, options.prompts), "translate"
    texts = {
        "previous": list(before or stated.previous)[-prompts.previous.count :],
        "gloss": [],
        "example": CueReader(options).examples(""),
    }
    found = {}
    for name in processor.cues:
        if name in _CODES:
            names = prompts.languages if name == "language" else prompts.sign_languages
            code = getattr(stated, name) or (next(iter(names)) if len(names) == 1 else "")
            if not code:
                option = "--" + name.replace("_", "-")
                fix = f"say {option} CODE" + (f": one of {', '.join(sorted(names))}" if names else "")
                raise DataError(f"the prompt shows {{{name}}}, which is not stated", where=where, fix=fix)
            found[name] = language_name(name, code, prompts, where)
        else:
            found[name] = value_of(name, texts[name], empty, where)
    return found


def gloss_of(prompts: PromptsConfig, samples: Samples, sample: int, row: IndexRow) -> str:
    """The gloss or pseudo-gloss of a sample; empty where there is none."""
    if prompts.gloss.source == ANNOTATION:
        return row.gloss
    return " ".join(samples.texts(prompts.gloss.source, sample)[:1])


def example_pool(samples: Samples, prompt: str, prompts: PromptsConfig, seed: int) -> tuple[tuple[str, str], ...]:
    """What `{example}` chooses from: distinct texts of training samples, drawn by the seed; none if it is not shown.

    Returns:
        (example as it is shown, the text in it) each.
    """
    if "example" not in cues_of(prompt):
        return ()
    draw = Draw(Purpose.CUES, seed, len(samples), 0)  # a number that no sample has
    of, pool = prompts.example, dict[int, tuple[str, str]]()
    for sample in np.argsort(draw.randoms(len(samples)), kind="stable").tolist():
        row = samples.row(sample)
        if not row.text.strip():
            continue
        gloss = gloss_of(prompts, samples, sample, row) if "gloss" in fields_of(of.template) else ""
        pool.setdefault(row.text_hash, (example_text(of.template, row.text, gloss), row.text))
        if len(pool) == of.pool:
            break
    return tuple(pool.values())


@dataclass(frozen=True, slots=True)
class FetchPrompted:
    """Clips with the cues of their samples; runs in loader processes."""

    clips: Callable[[SampleReader, Elements], list[Any]]
    """Gives the clips of an item."""
    cues: CueReader
    train: bool = False
    """Whether cues are left out and examples drawn."""

    @property
    def draws(self) -> bool:
        """Whether it has to know how often each sample was shown before (:mod:`shards.load.substitute`)."""
        return self.train

    def __call__(self, reader: SampleReader, item: Elements) -> list[Prompted]:
        shown = item["showing"].tolist() if self.train else None
        prompted: list[Prompted] = []
        for number, (sample, clip) in enumerate(zip(item["sample"].tolist(), self.clips(reader, item), strict=True)):
            draw = None
            if shown is not None:
                draw = Draw(Purpose.CUES, reader.plan.options.seed, sample, shown[number])
            prompted.append((clip, self.cues.cues(reader.plan.samples, sample, reader.row(sample), draw)))
        return prompted


def with_cues(
    clips: Callable[[SampleReader, Elements], list[Any]], processor: LlavaSltProcessor, train: bool = False
) -> Callable[..., Any]:
    """A fetch of clips as the processor's collate functions take it: with cues, where its prompt shows any."""
    return FetchPrompted(clips, CueReader(processor.options), train) if processor.cues else clips


def apart(items: list[list[Any]], processor: LlavaSltProcessor) -> tuple[list[list[Any]], list[Cues] | None]:
    """Clips of all items, and their cues where the prompt shows any."""
    if not processor.cues:
        return items, None
    return [[clip for clip, _ in item] for item in items], [cues for item in items for _, cues in item]


def prepare_cues(processor: LlavaSltProcessor, train: Plan, held_out: Sequence[Plan]) -> LlavaSltProcessor:
    """The processor with its pool of examples. Raises DataError for a sample that lacks what the prompt shows."""
    options = processor.options
    if not processor.cues:
        return processor
    pool = example_pool(train.samples, options.prompt, options.prompts, train.options.seed)
    processor = processor.with_examples(pool) if pool else processor
    for plan in (train, *held_out):
        check_cues(plan, CueReader(processor.options), train=plan is train)
    return processor


def check_cues(plan: Plan, reader: CueReader, train: bool) -> None:
    """Every sample of a plan has what the prompt shows of it. Raises DataError naming the first that has not.

    Checked before training: there, a sample that cannot be read is replaced by another.
    """
    samples = plan.samples
    for sample in suspects(samples, reader.options, train):
        reader.cues(samples, sample, samples.row(sample), Draw(Purpose.CUES, 0, sample, 0) if train else None)


def suspects(samples: Samples, options: ProcessorOptions, train: bool) -> list[int]:
    """Samples among which one lacks a cue if any does: the first of every language, and those without texts."""
    prompts, found = options.prompts, set[int]()
    empty = empty_texts(options.prompt, prompts)
    for name in cues_of(options.prompt):
        if name in _CODES:
            found.update(np.unique(samples.column(name).to_numpy(), return_index=True)[1].tolist())
        elif name == "example":
            own = [text_hash(text) for _, text in options.examples]
            hashes = samples.columns["text_hash"][np.arange(len(samples))]
            found.update(np.flatnonzero(np.isin(hashes, own) if own else hashes == hashes[0])[:1].tolist())
        elif name not in empty and (name == "previous" or train or prompts.gloss.held_out == "source"):
            column = prompts.previous.column if name == "previous" else prompts.gloss.source
            if column == ANNOTATION and name == "gloss":
                lacks = np.asarray([not gloss for gloss in samples.column("gloss").to_pylist()])
            else:
                lacks = samples.text_counts(column) == 0
            found.update(np.flatnonzero(lacks)[:1].tolist())
    return sorted(found)
