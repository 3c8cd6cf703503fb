"""shards.inspect.stats: every figure on sets whose figures are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError
from shards.inspect.plots_page import page
from shards.inspect.stats import describe, stats, utilisation, words
from shards.inspect.stats_report import show
from shards.schema import text_hash
from shards.storage.store import open_folder
from tests.unit.shards.shard_sets import in_memory, write_texts, write_videos

TEXTS = ["Rain comes.", "rain  COMES.", "wind", "the wind", "snow"]


def small() -> dict[str, object]:
    columns = {
        "split": ["train", "train", "train", "dev", "dev"],
        "text": TEXTS,
        "text_hash": [text_hash(text) for text in TEXTS],
        "signer": ["anna", "ben", "anna", "anna", "zoe"],
        "duration_seconds": [1.0, 2.0, 3.0, 4.0, 5.0],
        "fps": [25.0, 25.0, 12.5, 25.0, 25.0],
    }
    return describe(in_memory("video", [25, 50, 75, 100, 125], **columns), "data/set")


def test_groups() -> None:
    figures = small()
    dev, train = figures["groups"]  # type: ignore[misc]
    assert (train["samples"], train["frames"], train["distinct_texts"], train["repeated_texts"]) == (3, 150, 2, 1)
    assert (train["vocabulary"], train["signers"], dev["signers"]) == (3, 2, 2)
    assert train["seconds"]["p50"] == 2.0 and dev["length"] == {
        "unit": "frames", "mean": 112.5, "p05": 101.25, "p50": 112.5, "p95": 123.75, "max": 125.0
    }  # fmt: skip
    assert dev["hours"] == 0.003 and figures["dir"] == "data/set"


def test_vocabulary_and_signers() -> None:
    figures = small()
    names = ("words", "vocabulary", "singletons", "unknown_vocabulary", "unknown_words_fraction")
    assert figures["vocabulary"] == {
        "dev": dict(zip(names, (3, 3, 3, 2, 0.6667), strict=True)),
        "train": dict(zip(names, (5, 3, 1, 0, 0.0), strict=True)),
    }
    signers = figures["signers"]
    assert signers["train"] == {"samples": {"anna": 2, "ben": 1}, "unnamed": 0, "not_in_train": []}  # type: ignore[index]
    assert signers["dev"]["not_in_train"] == ["zoe"]  # type: ignore[index]
    assert figures["texts_shared_with_train"] == {"dev": 0}
    assert figures["frame_rates"] == {"12.5": 1, "25": 4} and figures["sizes"] == {"64x64": 5}


def test_a_set_without_train(capsys: pytest.CaptureFixture[str]) -> None:
    figures = describe(in_memory("video", [10, 20], split=["dev", "test"]), "x")
    assert figures["texts_shared_with_train"] == {"dev": None, "test": None}
    assert figures["signers"]["dev"] == {"samples": {}, "unnamed": 1, "not_in_train": None}
    dev = figures["vocabulary"]["dev"]
    assert dev["unknown_words_fraction"] is None is dev["unknown_vocabulary"]
    show(figures)
    shown = capsys.readouterr().out
    assert "dev: – samples have a text that also occurs in train" in shown
    assert "<td>–</td><td>0</td><td>–</td>" in page(figures, [])


def test_texts_that_are_equal_but_for_punctuation_are_shared() -> None:
    texts = ["Rain comes.", "»rain,  COMES«", "?!", "...", "rain"]
    splits = ["train", "dev", "train", "dev", "test"]
    found = describe(in_memory("video", [10] * 5, text=texts, split=splits), "x")["texts_shared_with_train"]
    assert found == {"dev": 1, "test": 0}, "marks alone are no text"


def test_sets_on_disk_and_in_object_stores(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "set", [np.arange(5, dtype="<u2"), np.arange(9, dtype="<u2")])
    figures = stats(folder)
    assert figures["kind"] == "text" and figures["groups"][0]["tokens"] == 14
    assert figures["frame_rates"] == {} and figures["sizes"] == {}
    remote = open_folder(f"memory://stats-{tmp_path.name}")
    for path in folder.iterdir():
        remote.upload(path, path.name)
    assert stats(remote.location) | {"dir": ""} == figures | {"dir": ""}
    with pytest.raises(DataError, match="not a shard set"):
        stats(tmp_path)
    assert stats(write_videos(tmp_path / "videos", [b"x"], [4]))["utilisation"]["unit"] == "clips per batch"


def test_words() -> None:
    assert words("„Hallo“, Welt! (2024) –") == ["hallo", "welt", "2024"]
    assert words("今天很好。", "zh-Hans") == ["今", "天", "很", "好"]
    assert words("今天很好。") == ["今天很好"]


def test_utilisation() -> None:
    rows = utilisation(np.full(1000, 256), "text")["rows"]
    assert [(row["size"], row["plain"], row["best"]) for row in rows] == [
        (512, 0.5, 1.0), (1024, 0.25, 1.0), (2048, 0.125, 1.0), (4096, 0.0625, 0.9921)
    ]  # fmt: skip
    rows = utilisation(np.asarray([100] * 64 + [50] * 64), "video")["rows"]
    assert [row["best"] for row in rows] == [1.0, 1.0, 0.75] and all(row["plain"] <= row["best"] for row in rows)
    assert utilisation(np.zeros(3, np.int64), "text")["rows"][0] == {"size": 512, "plain": 0.0, "best": 0.0}
    assert utilisation(np.zeros(3, np.int64), "video")["rows"][0] == {"size": 8, "plain": 0.0, "best": 0.0}
