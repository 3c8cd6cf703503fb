"""The plan: a pure function of index and options; nothing lost or repeated; states of other runs refused by name."""

from __future__ import annotations

import dataclasses
import json
import pickle
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import DataError
from shards.format.index import read_index
from shards.order.figures import describe, stats
from shards.order.options import PlanOptions, Source, kept_frames
from shards.order.plan import Cursor, Plan
from shards.order.samples import Samples
from tests.unit.shards.shard_sets import in_memory, write_videos

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
OPTIONS = {
    "clip": PlanOptions("clip"),
    "pack": PlanOptions("pack", block_tokens=40),
    "group": PlanOptions("group", frame_budget=128, length_window=16),
    "sequence": PlanOptions("sequence", block_tokens=40, frames_per_token=4, prompt_tokens=1, tokenizer="abc"),
}


def make(kind: str, lengths: list[int], seed: int = 0, **changes: object) -> Plan:
    shard_set = in_memory("text" if kind == "pack" else "video", lengths)
    if kind == "sequence":
        shard_set.manifest.options["text_tokenizer"] = "abc"
    return Plan([Source(shard_set)], dataclasses.replace(OPTIONS[kind], seed=seed, **changes))  # type: ignore[arg-type]


def tokens_of(items: list[np.ndarray]) -> Counter[tuple[int, int]]:
    """How often each (sample, position) occurs."""
    return Counter(
        (sample, position)
        for item in items
        for sample, start, length in item.tolist()
        for position in range(start, start + length)
    )


@given(st.sampled_from(sorted(OPTIONS)), LENGTHS, st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_shows_every_token_and_frame_exactly_once(kind: str, lengths: list[int], seed: int, e: int) -> None:
    plan = make(kind, lengths, seed)
    items = [plan.epoch(e).item(number) for number in range(len(plan.epoch(e)))]
    if kind == "sequence":
        lengths = [-(-length // 4) + 1 for length in lengths]
    expected = Counter((sample, position) for sample, length in enumerate(lengths) for position in range(length))
    assert tokens_of(items) == expected


@given(st.sampled_from(sorted(OPTIONS)), LENGTHS, st.integers(0, 2**40), st.lists(st.integers(1, 50), max_size=12))
def test_items_in_any_steps_are_the_epochs_one_after_another(
    kind: str, lengths: list[int], seed: int, steps: list[int]
) -> None:
    plan, cursor, read = make(kind, lengths, seed), Cursor(), []
    for count in steps:
        assert plan.advance(cursor, count) == plan.items(cursor, count)[1]
        items, cursor = plan.items(cursor, count)
        assert len(items) == count
        read += items
    assert cursor.consumed == sum(steps)
    again, end = make(kind, lengths, seed).items(Cursor(), sum(steps))
    assert end == cursor and [item.tolist() for item in again] == [item.tolist() for item in read]


def test_an_epoch_does_not_depend_on_the_epochs_asked_before() -> None:
    plan, fresh = make("pack", [7, 30, 12, 90, 3] * 8), make("pack", [7, 30, 12, 90, 3] * 8)
    for number in (0, 1, 2, 0, 5):
        plan.epoch(number)
    assert np.array_equal(plan.epoch(1).elements, fresh.epoch(1).elements)
    assert not np.array_equal(fresh.epoch(0).elements, fresh.epoch(1).elements)


@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 99))
def test_no_text_comes_twice_in_a_global_batch(texts: int, signers: int, seed: int) -> None:
    batch = min(8, texts)
    hashes = list(range(texts)) * signers
    shard_set = in_memory("video", [10] * len(hashes), text_hash=hashes)
    plan = Plan([Source(shard_set)], PlanOptions("clip", seed=seed, unique_texts_window=batch))
    epoch = plan.epoch(0)
    placed = [hashes[sample] for sample in epoch.elements["sample"]]
    assert sorted(placed) == sorted(hashes)
    windows = [placed[at : at + batch] for at in range(len(placed) - batch + 1)]
    repeated = sum(len(set(window)) < len(window) for window in windows)
    assert bool(repeated) <= bool(epoch.repeated_texts)
    if texts >= 2 * batch:
        assert repeated == 0
    assert stats(plan, 0)["repeated_texts"] == epoch.repeated_texts


def test_groups_keep_equal_texts_apart_too() -> None:
    hashes = [number % 60 for number in range(240)]
    shard_set = in_memory("video", [5 + number % 9 for number in range(240)], text_hash=hashes)
    plan = Plan([Source(shard_set)], dataclasses.replace(OPTIONS["group"], frame_budget=40, unique_texts_window=4))
    epoch = plan.epoch(0)
    assert epoch.repeated_texts == 0
    for first in range(len(epoch) - 3):
        texts = [hashes[s] for number in range(first, first + 4) for s in epoch.item(number)["sample"]]
        assert len(set(texts)) == len(texts)


def test_length_windows_make_neighbours_alike() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 2000).tolist()
    plain, sorted_plan = make("clip", lengths), make("clip", lengths, length_window=64)

    def waste(plan: Plan) -> float:
        batches = plan.epoch(0).elements["length"].reshape(-1, 8).astype(float)
        return 1 - float(batches.sum() / (batches.max(axis=1) * 8).sum())

    assert waste(sorted_plan) < 0.5 * waste(plain)
    assert sorted(sorted_plan.epoch(0).elements["sample"].tolist()) == list(range(2000))


def test_stats_add_up() -> None:
    packs = stats(make("pack", [20, 20, 30, 10, 100]))
    assert packs == {
        "items": 5, "samples": 5, "tokens": 180, "utilisation": 0.9, "padding": pytest.approx(0.1), "repeated_texts": 0,
        "left_out": 0,
    }  # fmt: skip
    groups = stats(make("group", [10, 10, 64, 64]))
    assert groups["frames"] == 148 and groups["utilisation"] == 1.0 and groups["items"] == 2


def test_lengths_are_the_frames_a_clip_delivers() -> None:
    plan = make("clip", [100, 99, 3, 1], max_frames=40, frame_stride=2)
    assert plan.chunks.lengths(np.arange(4)).tolist() == [40, 40, 2, 1]
    assert kept_frames(101, 0, 4) == 26


def test_a_slower_clip_has_room_for_its_frames_and_no_more_than_the_most() -> None:
    options = PlanOptions("clip", max_frames=10, frame_stride=2, slowest=0.5)
    frames = np.array([1, 5, 7, 30])
    assert options.lengths({"frames": frames, "tokens": frames}).tolist() == [2, 6, 8, 10]
    assert make("clip", [4], slowest=0.5).fingerprint != make("clip", [4]).fingerprint
    assert "slowest" not in make("clip", [4]).identity


def test_sources_are_selected_weighted_and_mixed() -> None:
    first = in_memory("video", [5] * 10, "a", split=["train"] * 6 + ["dev"] * 4)
    second = in_memory("video", [5] * 4, "b", corpus=["x", "y", "y", "y"])
    plan = Plan([Source(first, weight=2.0), Source(second, corpus="y")], PlanOptions("clip"))
    assert len(plan.samples) == 9 and plan.samples.counts == (6, 3) and plan.samples.distinct("corpus") == ["a", "y"]
    assert np.bincount(plan.epoch(0).elements["sample"]).tolist() == [2] * 6 + [1] * 3
    assert plan.items_per_epoch == 15
    assert plan.samples.row(6).key == "b1" and plan.samples.row(2).sample_id == "a2"
    assert plan.samples.shard_path(6) == Path("/nowhere/b/train-000000.tar")


def test_epochs_of_a_fixed_size_and_schedules() -> None:
    first, second = in_memory("video", [5] * 60, "a"), in_memory("video", [5] * 10, "b")
    sources = [Source(first, weight=[(0, 1.0), (2, 0.5)]), Source(second, weight=0.5)]  # type: ignore[arg-type]
    plan = Plan(sources, PlanOptions("clip", epoch_samples=30))
    drawn = [np.bincount(plan.epoch(e).elements["sample"] >= 60).tolist() for e in range(4)]
    assert drawn == [[20, 10], [18, 12], [15, 15], [15, 15]]
    shown = np.concatenate([plan.epoch(e).elements["sample"] for e in range(4)])
    assert np.array_equal(np.sort(np.bincount(shown)[:60]), [1] * 52 + [2] * 8)
    described = describe(plan, 1)
    assert described["epoch_samples"] == 30 and [s["epoch_samples"] for s in described["sources"]] == [18, 12]
    assert described["sources"][0]["weight"] == "0:1,2:0.5" and json.dumps(described)


def test_empty_documents_are_left_out() -> None:
    plan = make("pack", [0, 5, 0, 6])
    assert len(plan.samples) == 2 and [plan.samples.row(s).key for s in (0, 1)] == ["set1", "set3"]
    assert stats(plan)["left_out"] == 2 and stats(plan)["samples"] == 2
    with pytest.raises(DataError, match="none of the 2 samples with split 'train' and corpus 'any' can be shown"):
        make("pack", [0, 0])


def test_sequences_too_long_are_refused_or_counted() -> None:
    tokens = [3, 30, 20, 2]
    shard_set = in_memory("video", [40, 100, 200, 8], tokens=tokens)  # 10 + 3 + 1, 25 + 30 + 1, 50 + 20 + 1, 2 + 2 + 1
    shard_set.manifest.options["text_tokenizer"] = "abc"
    with pytest.raises(
        DataError, match="2 samples are longer than block_tokens=40; the longest has 71 tokens"
    ) as error:
        Plan([Source(shard_set)], OPTIONS["sequence"])
    assert "train-000000.tar:set2 (set/set2)" in str(error.value)
    plan = Plan([Source(shard_set)], dataclasses.replace(OPTIONS["sequence"], drop_longer=True))
    assert stats(plan) == {
        "items": 1, "samples": 2, "tokens": 19, "utilisation": 19 / 40, "padding": pytest.approx(21 / 40),
        "repeated_texts": 0, "left_out": 2,
    }  # fmt: skip
    short = Plan([Source(shard_set)], dataclasses.replace(OPTIONS["sequence"], max_frames=36))
    assert sorted(short.epoch(0).elements["length"].tolist()) == [5, 13, 30, 40]


def test_sequences_need_tokens_counted_by_the_right_tokenizer() -> None:
    shard_set = in_memory("video", [5])
    with pytest.raises(DataError, match="counted by tokenizer none, the plan needs abc"):
        Plan([Source(shard_set)], OPTIONS["sequence"])
    shard_set.manifest.options["text_tokenizer"] = "def"
    with pytest.raises(DataError, match="counted by tokenizer def, the plan needs abc"):
        Plan([Source(shard_set)], OPTIONS["sequence"])


def test_a_plan_counts_the_texts_of_its_sequences_itself() -> None:
    """Exactly as its model reads them, whatever the index holds; a worker process gets the same numbers."""
    sources = [
        Source(in_memory("video", [8, 12], "one", text=["a b", "c"])),
        Source(in_memory("video", [4], "two", text=["d e f"])),
    ]

    def count(samples: Samples) -> np.ndarray:
        return np.array([10 * len(text.split()) for text in samples.column("text").to_pylist()])

    plan = Plan(sources, OPTIONS["sequence"], count)
    elements = plan.epoch(0).elements
    assert dict(zip(elements["sample"].tolist(), elements["length"].tolist(), strict=True)) == {
        0: 2 + 20 + 1, 1: 3 + 10 + 1, 2: 1 + 30 + 1,
    }  # fmt: skip
    assert all(item["length"].sum() <= 40 for item in plan.epoch(0))
    _, (_, options, identity, counted) = plan.__reduce__()
    assert counted.tolist() == [20, 10, 30] and options == plan.options and identity == plan.identity
    shorter = dataclasses.replace(OPTIONS["sequence"], block_tokens=20, drop_longer=True)
    with pytest.raises(DataError, match=r"2 samples are longer than block_tokens=20; the longest has 32") as error:
        Plan(sources, shorter, count)
    assert "two/two0" in str(error.value)
    assert str(error.value).endswith("raise block_tokens (data.pack_tokens of a recipe) or lower max_frames")


def test_a_state_is_small_and_restores() -> None:
    sources = [Source(in_memory("video", [5] * 4, f"corpus-{n}")) for n in range(40)]
    plan = Plan(sources, PlanOptions("clip", seed=3))
    state = json.loads(json.dumps(plan.state(Cursor(1, 0, 2, 162))))
    assert len(json.dumps(state)) < 1024
    assert plan.restore(state) == Cursor(1, 0, 2, 162)
    del state["identity"]  # a trainer may keep cursor and fingerprint only
    assert plan.restore(state) == Cursor(1, 0, 2, 162)


@pytest.mark.parametrize(
    "change, named, part",
    [
        ({"seed": 9}, "seed: was 0, is 9", "different seed"),
        ({"max_frames": 8}, "max_frames: was 0, is 8", "different plan options"),
    ],
)
def test_a_state_of_other_options_is_refused_by_name(change: dict[str, int], named: str, part: str) -> None:
    state = make("clip", [5, 6, 7]).state(Cursor())
    other = make("clip", [5, 6, 7], **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"belongs to another order of samples: {named}"):
        other.restore(state)
    with pytest.raises(DataError, match=part):
        other.restore({name: value for name, value in state.items() if name != "identity"})


def test_a_state_of_other_shards_is_refused_by_name() -> None:
    state = make("clip", [5, 6, 7]).state(Cursor())
    with pytest.raises(DataError, match=r"sources: was \['.* train/\* x1'\], is"):
        make("clip", [5, 6, 8]).restore(state)
    with pytest.raises(DataError, match="different shards, split, corpus, weight or text columns"):
        make("clip", [5, 6, 8]).restore({name: value for name, value in state.items() if name != "identity"})
    many = [Source(in_memory("video", [5] * 4, f"corpus-{n}")) for n in range(40)]
    state = Plan(many, PlanOptions("clip")).state(Cursor())
    with pytest.raises(DataError, match="sources_digest: was"):
        Plan([*many[:39], dataclasses.replace(many[39], weight=2.0)], PlanOptions("clip")).restore(state)


def test_a_damaged_cursor_is_refused() -> None:
    plan = make("clip", [5])
    with pytest.raises(DataError, match="with non-negative integers"):
        plan.restore({"epoch": 0, "fingerprint": plan.fingerprint})
    assert Cursor.from_dict(Cursor(1, 2, 3, 4).to_dict()) == Cursor(1, 2, 3, 4)
    with pytest.raises(DataError, match="chunk 1 is beyond the 1 of epoch 2"):
        plan.restore(plan.state(Cursor(2, 1, 0, 5)))


def test_a_state_of_an_older_order_is_refused() -> None:
    plan = make("clip", [5])
    old = {"epoch": 0, "item": 0, "consumed": 0, "fingerprint": "0" * 32}
    with pytest.raises(DataError, match="belongs to another order of samples: order_version: was 1, is 2"):
        plan.restore({**old, "identity": {**plan.identity, "order_version": 1, "frame_stride": 3}})
    with pytest.raises(DataError, match="different plan options"):
        plan.restore(old)


def test_sources_that_match_nothing_name_what_there_is() -> None:
    shard_set = in_memory("video", [5, 6], corpus=["a", "b"], split=["train", "dev"])
    with pytest.raises(DataError, match="no sample has split 'test' and corpus 'any'; there are dev/b, train/a"):
        Plan([Source(shard_set, split="test")], PlanOptions("clip"))
    with pytest.raises(DataError, match="a plan of packs needs text shards, these hold video"):
        Plan([Source(shard_set)], PlanOptions("pack", block_tokens=8))


@pytest.mark.parametrize(
    "options, problem",
    [
        (PlanOptions("pack"), "block_tokens must be positive for kind 'pack'"),
        (PlanOptions("group"), "frame_budget must be positive"),
        (PlanOptions("sequence", block_tokens=8), "frames_per_token must be positive for kind 'sequence', it is 0"),
        (
            PlanOptions("pack", block_tokens=8, unique_texts_window=4),
            "unique_texts_window has no meaning for kind 'pack'",
        ),
        (PlanOptions("clip", epoch_samples=-1), "epoch_samples must not be negative"),
        (PlanOptions("clip", seed=-1), "seed must not be negative"),
        (PlanOptions("clip", frame_stride=0), "frame_stride must be positive"),
        (PlanOptions("clip", slowest=0.0), "slowest must be above 0 and at most 1, it is 0.0"),
    ],
)
def test_impossible_options_are_refused(options: PlanOptions, problem: str) -> None:
    with pytest.raises(DataError, match=f"plan options: .*{problem}"):
        Plan([Source(in_memory("video", [5]))], options)


def test_sources_are_required_and_weights_positive() -> None:
    with pytest.raises(DataError, match="no source is given"):
        Plan([], PlanOptions("clip"))
    with pytest.raises(DataError, match=r"weight of .* must be positive, it is 0"):
        Plan([Source(in_memory("video", [5]), weight=0)], PlanOptions("clip"))
    scheduled = Source(in_memory("video", [5]), weight=[(0, 1.0), (2, 0.0)])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="plan options: all weights are 0 in epoch 2"):
        Plan([scheduled], PlanOptions("clip"))
    with pytest.raises(DataError, match=r"weight of .* must be a number or a list of \(epoch, weight\) points"):
        Plan([Source(in_memory("video", [5]), weight=["x"])], PlanOptions("clip"))  # type: ignore[list-item]


def test_a_plan_travels_to_a_worker_by_reading_the_index_again(tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "set", [b"x" * n for n in range(1, 8)], [4] * 7)
    plan = Plan([Source(read_index(folder), weight=2.0)], PlanOptions("clip", seed=4))
    payload = pickle.dumps(plan)
    assert len(payload) < 4096
    copy = pickle.loads(payload)
    assert copy.fingerprint == plan.fingerprint and np.array_equal(copy.epoch(3).elements, plan.epoch(3).elements)
    (folder / "index.parquet").unlink()
    (folder / "manifest.json").unlink()
    for tar in folder.glob("*.tar"):
        tar.unlink()
    folder.rmdir()
    write_videos(folder, [b"other"] * 7, [4] * 7)
    with pytest.raises(DataError, match="the shards changed while the run was reading them: sources: was"):
        pickle.loads(payload)


def test_a_hundred_thousand_clips_are_planned_within_a_second() -> None:
    thousand = in_memory("video", [10 + number % 200 for number in range(1000)])
    begin = time.process_time()
    plan = Plan([Source(thousand)] * 100, OPTIONS["group"])
    for chunk in range(plan.chunks.count(0)):
        plan.chunks.make(0, chunk)
    assert len(plan.samples) == 100_000 and time.process_time() - begin < 1.5


def test_the_next_chunk_is_made_before_it_is_asked_for() -> None:
    plan = Plan([Source(in_memory("video", [10] * 1000))] * 70, PlanOptions("clip"))
    _, cursor = plan.items(Cursor(), 40_000)
    assert cursor.chunk == 1 and plan.items_per_epoch == 70_000 and plan.chunks.count(0) == 2
    plan.items(cursor, 1)
    pending = plan._cache._pending
    assert pending is not None and pending.key == (1, 0)
    made, after = plan.items(Cursor(1, 0, 0, 70_000), 2)
    assert pending.items.done() and after == Cursor(1, 0, 2, 70_002)
    fresh = Plan(plan.sources, plan.options)
    assert [item.tolist() for item in made] == [item.tolist() for item in fresh.items(Cursor(1), 2)[0]]


def test_an_error_in_the_thread_reaches_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan([Source(in_memory("video", [10] * 1000))] * 70, PlanOptions("clip"))
    cursor = plan.advance(Cursor(), 0)
    plan._cache.chunk(0, 0)
    monkeypatch.setattr(plan.chunks, "make", lambda *key: 1 // 0)
    plan.items(cursor, 1)
    with pytest.raises(ZeroDivisionError):
        plan.items(Cursor(0, 1), 1)
