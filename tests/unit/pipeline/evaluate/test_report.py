from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.evaluate.metrics import score
from pipeline.evaluate.protocols import get_protocol
from pipeline.evaluate.report import (
    merge_predictions,
    part_path,
    read_predictions,
    write_part,
    write_predictions,
    write_scores,
)
from pipeline.inference.generate import Prediction
from shards.errors import DataError

DEFAULT = get_protocol("default")


def predictions(*ids: str) -> list[Prediction]:
    return [Prediction("corpus", name, "test", "signer 1", f"text of {name}", f"text {name}") for name in ids]


def test_parts_merge_in_the_order_of_the_split(tmp_path: Path) -> None:
    write_part(tmp_path, 0, 3, predictions("a", "d"))
    write_part(tmp_path, 1, 3, predictions("c", "b"))
    write_part(tmp_path, 2, 3, [])
    write_part(tmp_path, 0, 1, predictions("stale"))  # of an earlier run with another world size
    merged = merge_predictions(tmp_path, 3, [f"corpus/{name}" for name in "abcd"])
    assert merged == predictions("a", "b", "c", "d")


def test_tables(tmp_path: Path) -> None:
    odd = Prediction("c", "x\ty", "dev", "", "line\none", "tab\there")
    write_predictions(tmp_path, [odd, *predictions("b")], DEFAULT)
    assert read_predictions(tmp_path / "predictions.parquet") == [odd, *predictions("b")]
    assert pq.read_table(tmp_path / "predictions.parquet")["sentence_bleu"].to_pylist()[0] == 0.0
    lines = (tmp_path / "predictions.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t")[-1] == "sentence_bleu"
    assert lines[1].split("\t")[:2] == ["c", "x y"] and len(lines) == 3
    assert {len(line.split("\t")) for line in lines} == {7}
    assert not list(tmp_path.glob(".*"))


def test_scores_file_says_how(tmp_path: Path) -> None:
    scores = score(["Süden"], ["süden"], "phoenix14t_dot")
    content = json.loads(write_scores(tmp_path, scores, {"split": "test"}).read_text(encoding="utf-8"))
    assert content["scores"]["bleu1"] == pytest.approx(100.0)
    assert content["protocol"]["suffix"] == " ." and content["protocol"]["source"]
    assert "case:lc" in content["scores"]["signatures"]["bleu"]
    assert content["split"] == "test" and content["versions"]["sacrebleu"]


@pytest.mark.parametrize(
    ("parts", "expected", "message"),
    [
        ([["a"], ["a", "b"]], ["a", "b"], "1 samples translated twice (corpus/a)"),
        ([["a"], []], ["a", "b", "c"], "2 samples not translated (corpus/b, corpus/c)"),
        ([["a"], ["z"]], ["a"], "1 samples not part of the split (corpus/z)"),
        ([["a"], []], ["a", "a"], "1 samples in the split twice (corpus/a)"),
        ([[], []], list("abcdefg"), "7 samples not translated (corpus/a, corpus/b, corpus/c, corpus/d, corpus/e, ...)"),
    ],
)
def test_merge_refuses_wrong_sets(parts: list[list[str]], expected: list[str], message: str, tmp_path: Path) -> None:
    for rank, names in enumerate(parts):
        write_part(tmp_path, rank, len(parts), predictions(*names))
    with pytest.raises(DataError) as caught:
        merge_predictions(tmp_path, len(parts), [f"corpus/{name}" for name in expected])
    assert message in str(caught.value) and "evaluate again" in str(caught.value)


def test_missing_part_names_the_rank(tmp_path: Path) -> None:
    write_part(tmp_path, 0, 2, [])
    with pytest.raises(DataError, match="rank 1 of 2 left no predictions") as caught:
        merge_predictions(tmp_path, 2, [])
    assert str(part_path(tmp_path, 1, 2)) in str(caught.value)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        write_part(tmp_path, 0, 1, [object()])  # type: ignore[list-item]
    assert not list((tmp_path / "parts").iterdir())
