"""Subsets and copies: copies are equal bytes, splits do not leak, nothing half-written stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.build.build import BuildOptions, build
from shards.errors import DataError
from shards.exchange import copying
from shards.exchange.subset import assign_splits, head, split
from shards.format.index import fingerprint, read_index, rows_to_table, write_index
from shards.format.verify import verify
from shards.inspect.lint import lint
from shards.storage.store import open_folder
from tests.unit.shards.making import save_tokenizer, text_corpus, video_corpus
from tests.unit.shards.shard_sets import in_memory, write_videos

PARTS = {"train": 0.8, "dev": 0.1, "test": 0.1}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    payloads = [b"video" + bytes([number]) * (900 + number) for number in range(30)]
    return write_videos(tmp_path_factory.mktemp("subset") / "set", payloads, list(range(1, 31)))


def payloads(folder: Path) -> dict[str, bytes]:
    """Payload by sample id."""
    return {
        row.sample_id: (folder / row.shard).read_bytes()[row.offset : row.offset + row.size]
        for row in read_index(folder).rows()
    }


def test_split_copies_every_byte(videos: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = split(videos, tmp_path / "out", PARTS, on_progress=lambda *state: seen.append(state))
    assert manifest.splits == {"dev": 3, "test": 3, "train": 24} and seen[-1] == (30, 30)
    assert payloads(tmp_path / "out") == payloads(videos) and verify(tmp_path / "out") == []
    assert manifest.options["derived"] == {
        "from": read_index(videos).fingerprint, "verb": "split", "fractions": PARTS, "groups": ["text"], "seed": 0
    }  # fmt: skip
    for row in read_index(tmp_path / "out").rows():
        blob = (tmp_path / "out" / row.shard).read_bytes()
        assert json.loads(blob[row.meta_offset : row.meta_offset + row.meta_size])["split"] == row.split
        assert row.shard.startswith(f"{row.split}-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_split_is_reproducible_and_seeded(videos: Path, tmp_path: Path) -> None:
    first = split(videos, tmp_path / "a", PARTS, seed=1)
    assert split(videos, tmp_path / "b", PARTS, seed=1).fingerprint == first.fingerprint
    assert split(videos, tmp_path / "c", PARTS, seed=2).fingerprint != first.fingerprint
    assert (tmp_path / "a" / "dev-000000.tar").read_bytes() == (tmp_path / "b" / "dev-000000.tar").read_bytes()


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=30, max_size=80),
    st.sampled_from([("text",), ("signer",), ("text", "signer")]),
    st.integers(0, 5),
)
def test_nothing_leaks(samples: list[tuple[int, int]], groups: Sequence[str], seed: int) -> None:
    texts, signers = [text for text, _ in samples], [f"s{signer}" for _, signer in samples]
    table = in_memory("video", [5] * len(samples), text_hash=texts, signer=signers).table
    try:
        names = assign_splits(table, {"train": 0.7, "dev": 0.3}, groups, seed)
    except DataError as error:
        assert "cannot fill 2 splits" in str(error)
        return
    values = {"text": texts, "signer": signers}
    for group in groups:
        for value in set(values[group]):
            assert len({name for name, other in zip(names, values[group], strict=True) if other == value}) == 1
    assert set(names) == {"train", "dev"}
    backwards = table.take(list(range(len(samples)))[::-1])
    assert assign_splits(backwards, {"train": 0.7, "dev": 0.3}, groups, seed)[::-1].tolist() == names.tolist()


def test_fractions_are_met() -> None:
    names = assign_splits(in_memory("video", [1] * 1000).table, PARTS, ("text",), 0)
    assert {name: int((names == name).sum()) for name in PARTS} == {"train": 800, "dev": 100, "test": 100}


@pytest.mark.parametrize(
    ("fractions", "groups", "message"),
    [
        ({"train": 0.8, "dev": 0.1}, ("text",), "add up to 0.9"),
        ({"train": 1.2, "dev": -0.2}, ("text",), "add up to 1"),
        ({"Train": 1.0}, ("text",), "'Train' is no name of a split"),
        (PARTS, ("corpus",), "cannot group by 'corpus'"),
        (PARTS, ("signer",), "30 of 30 samples have no signer"),
        ({f"s{n}": 1 / 40 for n in range(40)}, ("text",), "30 groups by text cannot fill 40 splits"),
    ],
)
def test_wrong_splits(
    videos: Path, tmp_path: Path, fractions: dict[str, float], groups: Sequence[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        split(videos, tmp_path / "out", fractions, groups)
    assert list(tmp_path.iterdir()) == []


def test_head_of_real_videos(tmp_path: Path) -> None:
    build(video_corpus(tmp_path / "v", 4), tmp_path / "set", BuildOptions())
    manifest = head(tmp_path / "set", tmp_path / "out", 2)
    assert manifest.splits == {"train": 2} and lint(tmp_path / "out").problems == []
    kept = list(read_index(tmp_path / "out").rows())
    assert [row.sample_id for row in kept] == ["clip.0", "clip.1"] and kept[0].gloss == "SATZ"
    whole = head(tmp_path / "set", tmp_path / "whole", 99)
    assert whole.shards == read_index(tmp_path / "set").manifest.shards


def test_head_of_a_text_set(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    build(text_corpus(40), tmp_path / "set", BuildOptions(tokenizer=tokenizer, tokens_per_member=100))
    manifest = head(tmp_path / "set", tmp_path / "out", 25)
    from shards.inspect.lint_shard import LintOptions

    assert manifest.splits == {"train": 25}
    assert lint(tmp_path / "out", LintOptions(tokenizer=tokenizer)).problems == []
    rows = list(read_index(tmp_path / "out").rows())
    assert len({row.key for row in rows}) > 1 and [row.sample_id for row in rows] == [f"d:{n}" for n in range(25)]


def test_features(tmp_path: Path) -> None:
    values = [np.full((3, 4), number, "<f2") for number in range(4)]
    folder = write_videos(tmp_path / "set", [value.tobytes() for value in values], [3] * 4)
    shard_set = read_index(folder)
    rows = [row._replace(width=4) for row in shard_set.rows()]
    shard_set.manifest.kind = "features"
    table = rows_to_table(rows)
    shard_set.manifest.fingerprint = fingerprint(shard_set.manifest.shards, table)
    write_index(folder, table, shard_set.manifest)
    head(folder, tmp_path / "out", 2)
    assert lint(tmp_path / "out").by_rule().keys() <= {"text_too_long", "few_frames"}
    copied = payloads(tmp_path / "out")
    assert [np.frombuffer(data, "<f2")[0] for data in copied.values()] == [0.0, 1.0]
    row = read_index(tmp_path / "out").row(1)
    blob = (tmp_path / "out" / row.shard).read_bytes()
    assert blob[row.offset - 128 : row.offset].startswith(b"\x93NUMPY")


def test_from_an_object_store(videos: Path, tmp_path: Path) -> None:
    remote = open_folder(f"memory://subset-{tmp_path.name}")
    for path in videos.iterdir():
        remote.upload(path, path.name)
    assert head(remote.location, tmp_path / "out", 3).splits == {"train": 3}


def test_damage_stops_the_copy(videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for path in videos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    row = read_index(folder).row(12)
    with (folder / row.shard).open("r+b") as handle:
        handle.seek(row.offset)
        handle.write(b"x")
    with pytest.raises(DataError, match=rf"{row.shard}:{row.key}: the bytes of clip0012 do not match the CRC-32"):
        head(folder, tmp_path / "out", 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_the_folder_must_be_new(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(DataError, match="the folder is not empty"):
        head(videos, tmp_path, 2)
    assert (tmp_path / "note").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the copy"):
        head(videos, tmp_path / "file" / "out", 2)
    with pytest.raises(DataError, match="0 samples per split"):
        head(videos, tmp_path / "out", 0)


def test_a_copy_that_does_not_verify_is_removed(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "verify", lambda folder: ["sha256: the bytes differ"])
    with pytest.raises(DataError, match="the copy is damaged: sha256"):
        head(videos, tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []


def test_equal_keys_from_two_corpora(tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "set", [b"a" * 10, b"b" * 10], [1, 1], per_shard=1)
    rows = list(read_index(folder).rows())
    changed = [rows[0], rows[1]._replace(key=rows[0].key, corpus="other")]
    manifest = read_index(folder).manifest
    table = rows_to_table(changed)
    manifest.fingerprint = fingerprint(manifest.shards, table)
    write_index(folder, table, manifest)
    head(folder, tmp_path / "out", 2)
    first, second = read_index(tmp_path / "out").rows()
    assert first.key == "clip0000" and second.key.startswith("other_clip0001-")
