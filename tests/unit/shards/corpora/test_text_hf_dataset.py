"""Saved Hugging Face datasets, written here as ``save_to_disk`` of datasets 5 writes them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from shards.corpora import make_corpus
from shards.corpora.hf_dataset import HfDataset
from shards.errors import DataError

ROWS = [
    {"text": f"doc {n}", "gloss": ["A", f"B{n}"], "translation": {"de": f"satz {n}", "en": None}} for n in range(50)
]


def save(folder: Path, rows: list[dict[str, Any]], files: int = 1, **state: Any) -> Path:
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    for number, name in enumerate(names):
        table = pa.Table.from_pylist(rows[number::files])
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    values = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(values))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def save_dict(root: Path, **splits: int) -> Path:
    for name, rows in splits.items():
        save(root / name, ROWS[:rows], files=2)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return root


def test_one_dataset(tmp_path: Path) -> None:
    corpus = HfDataset(
        root=save(tmp_path / "set", ROWS), text="translation.de", gloss="gloss", templates=["{gloss}: {text}"]
    )
    segments = list(corpus.segments())
    assert [segment.text for segment in segments] == [f"A B{n}: satz {n}" for n in range(50)]
    assert {segment.split for segment in segments} == {"train"} and segments[8].id == "train:8#0.0"
    assert segments[8].origin.endswith("data-00000-of-00001.arrow:9")


def test_a_dict_of_splits(tmp_path: Path) -> None:
    root = save_dict(tmp_path / "set", train=10, validation=4, unsupervised=9)
    corpus = make_corpus("hf_dataset", {"root": str(root)})
    counts: dict[str, int] = {}
    for segment in corpus.segments():
        counts[segment.split] = counts.get(segment.split, 0) + 1
    assert counts == {"train": 10, "dev": 4}
    both = HfDataset(root=root, splits={"unsupervised": "train", "validation": "dev"})
    assert len(list(both.segments())) == 13 and len({segment.id for segment in both.segments()}) == 13


def test_wrong_folders_and_options(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither dataset_dict\.json nor state\.json in it\n  fix: pass the folder"):
        HfDataset(root=tmp_path)
    root = save_dict(tmp_path / "set", unsupervised=3)
    with pytest.raises(DataError, match=r"none of the dataset's splits \['unsupervised'\] is mapped"):
        HfDataset(root=root)
    with pytest.raises(DataError, match="split 'Dev set'"):
        HfDataset(root=root, splits={"unsupervised": "Dev set"})
    with pytest.raises(DataError, match=r"no column 'body'; there are \['text', 'gloss', 'translation'\]"):
        list(HfDataset(root=root, splits={"unsupervised": "train"}, text="body").segments())
    (root / "dataset_dict.json").write_text('{"splits": 3}')
    with pytest.raises(DataError, match=r"dataset_dict\.json: splits is 3, not a list"):
        HfDataset(root=root)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": []}, r"state\.json: names the data files \[\]"),
        ({"_data_files": [{"filename": "../x.arrow"}]}, r"names the data files \['\.\./x\.arrow'\]"),
        ({"_data_files": [7]}, r"names the data files \[None\]"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, r"gone\.arrow: not an Arrow stream \(.*No such file"),
        ({"_indices_data_files": [{"filename": "i.arrow"}]}, "the rows are chosen by an index file"),
    ],
)
def test_wrong_states(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(HfDataset(root=save(tmp_path / "set", ROWS, **state)).segments())


def test_cut_and_damaged_streams(tmp_path: Path) -> None:
    corpus = HfDataset(root=save(tmp_path / "set", ROWS))
    path = next((tmp_path / "set").glob("*.arrow"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])  # between two batches: Arrow reads it without a word
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        assert reader.read_all().num_rows == 50
    with pytest.raises(
        DataError, match=rf"cut off after {len(whole) - 8} bytes: no end mark\n  fix: copy or save it again"
    ):
        list(corpus.segments())
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"cut off after 0 bytes|not an Arrow stream"):
        list(corpus.segments())
    rng = random.Random(1)
    for _ in range(80):
        broken = bytearray(whole)
        for _ in range(3):
            broken[rng.randrange(len(broken) - 8)] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            list(corpus.segments())
        except DataError as error:
            assert ".arrow" in str(error)
