"""Augmented clips and drawn references in steps: the same bytes for any workers and ranks, and after a resume."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from pipeline.inference.augment import Augment
from pipeline.inference.clips import FetchFrames
from pipeline.inference.references import most_of_texts, texts_of_sample
from shards.build.build import BuildOptions, build
from shards.format.index import ShardSet, read_index
from shards.format.text_columns import write_column
from shards.load.loader import EvalLoader, LoaderOptions, StepLoader
from shards.order.options import PlanOptions, Source
from shards.order.plan import Cursor, Plan
from tests.unit.pipeline.inference.test_augment import STRONG
from tests.unit.shards.making import video_corpus

SAMPLES, BATCH, SEED = 10, 4, 3


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Ten clips; sample n has n % 3 paraphrases."""
    folder = tmp_path_factory.mktemp("augmented")
    build(video_corpus(folder / "source", SAMPLES), folder / "videos", BuildOptions(samples_per_shard=4))
    shard_set = read_index(folder / "videos")
    write_column(shard_set, "paraphrase", [[f"{n} once", f"{n} twice"][: n % 3] for n in range(SAMPLES)], {})
    return shard_set


def plan_of(shard_set: ShardSet, **options: Any) -> Plan:
    source = Source(shard_set, weight=1.5, columns=("paraphrase",))
    return Plan([source], PlanOptions(**{"kind": "clip", "seed": SEED, "slowest": STRONG.slowest, **options}))


def digests(items: list[list[Any]]) -> dict[str, Any]:
    """Per item the bytes of its clips and their texts."""
    clips = [clip for item in items for clip in item]
    return {"clips": [(hashlib.sha256(frames.tobytes()).hexdigest(), row.text) for frames, row in clips]}


def steps(plan: Plan, world: int, workers: int = 0, first: int = 0, count: int = 12) -> list[list[tuple[str, str]]]:
    """The clips of global batches, in plan order, from all ranks."""
    fetch = FetchFrames(16, 1, 24, Augment(STRONG, SEED), ("paraphrase",))
    ranks = []
    for rank in range(world):
        loader = StepLoader(plan, fetch, digests, LoaderOptions(rank, world, BATCH, 1, workers))
        loader.load_state_dict(plan.state(plan.advance(Cursor(), first * BATCH)))
        ranks.append(list(islice(loader, count)))
    slots = range(BATCH // world)
    together = zip(*ranks, strict=True)
    return [[c for slot in slots for step in parts for c in step.micro_batches[slot]["clips"]] for parts in together]


def test_the_same_bytes_for_any_ranks_and_workers_and_after_a_resume(shard_set: ShardSet) -> None:
    plan = plan_of(shard_set)
    whole = steps(plan, 1)
    assert steps(plan, 2) == whole
    assert steps(plan, 1, workers=1) == steps(plan, 1, workers=3) == whole
    assert steps(plan, 2, first=5, count=7) == whole[5:]
    shown = [clip for step in whole for clip in step]
    assert len({frames for frames, _ in shown}) == len(shown), "no showing looks like another"


def test_every_text_of_a_sample_has_its_turn(shard_set: ShardSet) -> None:
    plan = plan_of(shard_set)
    fetch = FetchFrames(4, 1, 8, references=("paraphrase",))
    assert fetch.draws
    loader = StepLoader(plan, fetch, digests, LoaderOptions(0, 1, 6, 6))
    shown = [text for step in islice(loader, 10) for _, text in step.micro_batches[0]["clips"]]
    for sample in range(SAMPLES):
        own = plan.samples.row(sample).text
        texts = texts_of_sample(plan.samples, sample, own, ["paraphrase"])
        assert texts == [own, f"{sample} once", f"{sample} twice"][: 1 + sample % 3]
        counts = [Counter(shown)[text] for text in texts]
        assert sum(counts) == 6 and set(counts) == {6 // len(texts)}


def test_a_row_keeps_the_identity_of_its_text(shard_set: ShardSet) -> None:
    plan = plan_of(shard_set)
    fetch = FetchFrames(4, 1, 8, references=("paraphrase",))
    rows: list[Any] = []
    for step in islice(StepLoader(plan, fetch, list_rows, LoaderOptions(0, 1, 6, 6)), 6):
        rows += step.micro_batches[0]["rows"]
    changed = [row for row in rows if row.text.endswith(("once", "twice"))]
    assert changed and all(row.text_hash == plan.samples.row(int(row.text.split()[0])).text_hash for row in changed)


def list_rows(items: list[list[Any]]) -> dict[str, Any]:
    return {"rows": [row for item in items for _, row in item]}


def test_evaluation_shows_clips_and_texts_as_they_are(shard_set: ShardSet) -> None:
    plan = plan_of(shard_set, shuffle=False, slowest=1.0)
    loader = EvalLoader(plan, FetchFrames(16, 1, 24), list_rows, micro_batch=3)
    assert [row.text for batch, _ in loader for row in batch["rows"]][:SAMPLES] == plan.samples.column(
        "text"
    ).to_pylist()


def test_an_item_has_room_for_the_longest_text(shard_set: ShardSet) -> None:
    samples = plan_of(shard_set).samples
    own = samples.column("text").to_pylist()
    assert most_of_texts(samples, (), len).tolist() == [len(text) for text in own]
    several = [texts_of_sample(samples, n, text, ("paraphrase",)) for n, text in enumerate(own)]
    expected = [max(map(len, texts)) for texts in several]
    assert most_of_texts(samples, ("paraphrase",), len).tolist() == expected
    measured: list[str] = []
    most_of_texts(samples, ("paraphrase",), lambda text: measured.append(text) or 1)
    assert len(measured) == len(set(measured)), "equal texts are measured once"
