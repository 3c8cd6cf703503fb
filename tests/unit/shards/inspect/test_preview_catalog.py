"""shards.inspect.preview_catalog: search, filters, order and pages; details and tokens of one sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.build.build import BuildOptions, build
from shards.errors import DataError
from shards.format.index import write_index
from shards.format.opening import media_type
from shards.inspect.preview_catalog import Catalog, Query
from tests.unit.shards.making import save_tokenizer, text_corpus, video_corpus
from tests.unit.shards.shard_sets import in_memory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    columns: dict[str, list[Any]] = {
        "text": ["Rain 100%", "rain and wind", "snow", "RAIN", "äöü"],
        "gloss": ["", "WIND", "", "", ""],
        "split": ["train", "train", "dev", "dev", "train"],
        "signer": ["anna", "ben", "anna", "", "ben"],
        "sample_id": ["z", "y", "x", "w", "a_b"],
        "duration_seconds": [3.0, 1.0, 2.0, 5.0, 4.0],
    }
    made = in_memory("video", [10, 20, 30, 40, 50], **columns)
    folder = tmp_path_factory.mktemp("catalog")
    write_index(folder, made.table, made.manifest)
    return Catalog(folder)


def found(catalog: Catalog, **query: str) -> list[int]:
    return [row["number"] for row in catalog.page(Query(**query), 1, 50)["rows"]]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"search": "rain"}, [0, 1, 3]),
        ({"search": "wind rain"}, [1]),
        ({"search": "ben"}, [1, 4]),
        ({"search": "100%"}, [0]),
        ({"search": ".*"}, []),
        ({"search": "Ä"}, [4]),
        ({"search": "_"}, [4]),
        ({"split": "dev"}, [2, 3]),
        ({"split": "dev", "signer": "anna"}, [2]),
        ({"corpus": "nowhere"}, []),
        ({"language": "de", "search": "snow"}, [2]),
        ({"sort": "length"}, [1, 2, 0, 4, 3]),
        ({"sort": "-length"}, [3, 4, 0, 2, 1]),
        ({"sort": "text"}, [4, 2, 3, 0, 1]),
        ({"sort": "-text"}, [1, 0, 2, 3, 4]),
        ({"sort": "id"}, [4, 3, 2, 1, 0]),
        ({"sort": "id", "split": "train"}, [4, 1, 0]),
    ],
)
def test_queries(catalog: Catalog, query: dict[str, str], expected: list[int]) -> None:
    assert found(catalog, **query) == expected


def test_pages(catalog: Catalog) -> None:
    page = catalog.page(Query(), 2, 2)
    assert ([row["number"] for row in page["rows"]], page["pages"], page["matching"]) == ([2, 3], 3, 5)
    assert catalog.page(Query(), 99, 2)["page"] == 3 and catalog.page(Query(), 0, 0)["per_page"] == 1
    assert catalog.page(Query(search="nothing"), 1, 50) == {
        "matching": 0, "page": 1, "pages": 1, "per_page": 50, "rows": []
    }  # fmt: skip


def test_summary(catalog: Catalog) -> None:
    summary = catalog.summary()
    assert (summary["samples"], summary["seconds"], summary["kind"]) == (5, 15.0, "video")
    assert summary["choices"]["signer"] == {
        "all": 2, "common": [{"value": "anna", "samples": 2}, {"value": "ben", "samples": 2}]
    }  # fmt: skip


def test_many_samples_answer_quickly(tmp_path: Path) -> None:
    number = 20_000
    made = in_memory("video", range(1, number + 1), signer=[f"s{n % 500}" for n in range(number)])
    write_index(tmp_path, made.table, made.manifest)
    big = Catalog(tmp_path)
    assert big.page(Query(search="text 1999"), 1, 50)["matching"] == 12  # 1999, 11999, 19990 to 19999
    signers = big.summary()["choices"]["signer"]
    assert signers["all"] == 500 and len(signers["common"]) == 200
    for term in range(40):
        big.page(Query(search=f"text {term}"), 1, 1)
    assert len(big._recent) <= 16


def test_wrong_requests(catalog: Catalog) -> None:
    with pytest.raises(DataError, match=r"no such sample: sample 5 of a set of 5"):
        catalog.sample(5)
    with pytest.raises(DataError, match="unknown order 'evil'"):
        Query(sort="evil")


def test_video_details(tmp_path: Path, tokenizer: str) -> None:
    build(video_corpus(tmp_path / "v", 1), tmp_path / "set", BuildOptions())
    detail = Catalog(tmp_path / "set", tokenizer).sample(0)
    assert detail["checksum_ok"] and detail["media_type"] == "video/mp4" and detail["words"] == 3
    assert detail["meta"]["id"] == "clip.0" and detail["row"]["gloss"] == "SATZ"
    assert [token["kind"] for token in detail["tokens"]["tokens"]] == ["special", *["unknown"] * 3, "special"]
    assert detail["tokens"]["stored"] is False
    assert Catalog(tmp_path / "set").sample(0)["tokens"] is None


def test_stored_tokens(tmp_path: Path, tokenizer: str) -> None:
    build(text_corpus(3), tmp_path / "set", BuildOptions(tokenizer=tokenizer))
    catalog = Catalog(tmp_path / "set", tokenizer)
    detail = catalog.sample(1)
    pieces = [token["piece"] for token in detail["tokens"]["tokens"]]
    assert pieces == ["<s>", *detail["row"]["text"].split(), "</s>"] and detail["tokens"]["stored"] is True
    assert detail["meta"] is None and detail["checksum_ok"] and detail["media_type"] == ""
    plain = Catalog(tmp_path / "set").sample(1)["tokens"]["tokens"]
    assert [token["id"] for token in plain] == [token["id"] for token in detail["tokens"]["tokens"]]
    assert {token["piece"] for token in plain} == {None}
    assert catalog._token(10_000) == {"id": 10_000, "piece": None, "kind": "outside"}
    with pytest.raises(DataError, match="sample 1 is no video"):
        catalog.media(1)


def test_metadata_that_is_no_json(tmp_path: Path) -> None:
    from tests.unit.shards.shard_sets import write_videos

    folder = write_videos(tmp_path / "set", [b"x" * 10], [1])
    catalog = Catalog(folder)
    row = catalog.row(0)
    with (folder / row["shard"]).open("r+b") as handle:
        handle.seek(row["meta_offset"])
        handle.write(b"\xff!")
    detail = catalog.sample(0)
    assert detail["checksum_ok"] is False and detail["meta"].startswith("\ufffd!")


def test_media_types() -> None:
    kinds = [media_type(head) for head in (b"\x1a\x45\xdf\xa3abc", b"RIFF....AVI ", b"\0\0\0 ftypisom")]
    assert kinds == ["video/webm", "video/x-msvideo", "video/mp4"] and np.asarray(kinds).size == 3
