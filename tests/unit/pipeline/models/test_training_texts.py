"""Evaluation sentences that the language model has read: found through the exports' recipes, counted, and told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml

from pipeline.config.schema import DataConfig, SourceConfig
from pipeline.models.training_texts import training_texts, warn_of_known_texts
from pipeline.stages.data import Plans, StageContext
from pipeline.stages.video import check_video
from shards.format.index import INDEX_NAME, write_index
from tests.unit.shards.shard_sets import in_memory

KNOWN = ["rain in the north", "sun"]


def export(folder: Path, **recipe: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    made = in_memory("text", [3, 3, 3], text=[*KNOWN, "held out"], split=["train", "train", "dev"])
    (folder := tmp_path / "texts").mkdir()
    write_index(folder, made.table, made.manifest)
    return folder


@pytest.fixture
def llm(tmp_path: Path, texts: Path) -> Path:
    return export(tmp_path / "llm", stage="continued_pretraining", data={"train": [{"shards": str(texts)}]})


def test_the_texts_of_an_export(tmp_path: Path, llm: Path, texts: Path) -> None:
    assert training_texts(llm) == [(str(texts), "train")]
    later = export(tmp_path / "later", stage="connector", model={"llm": {"path": str(llm)}})
    assert training_texts(later) == [(str(texts), "train")]
    for recipe in (
        {"stage": "contrastive"},
        {"stage": "connector", "model": {"llm": {"path": str(tmp_path / "round")}}},
    ):
        folder = tmp_path / "round"
        if not folder.exists():
            export(folder)
        (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe))
        assert training_texts(folder) == []
    assert training_texts(tmp_path / "hub" / "name") == []


def test_known_sentences_are_told(llm: Path, texts: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert warn_of_known_texts(None, KNOWN) is None is warn_of_known_texts(llm, []) and not caplog.text
    found = warn_of_known_texts(llm, ["Rain in the North.", "sun", "sun", "held out"])
    assert found == {
        "shards": {str(texts): "train"}, "samples": 4, "known": 3, "example": "Rain in the North.", "documents": 2,
        "complete": True,
    }  # fmt: skip
    assert f"3 of 4 evaluation texts are among the 2 documents that the language model was trained on ({texts})" in (
        caplog.text
    )
    assert "slt shards build text --paths train=VIDEO_SET" in caplog.text
    caplog.clear()
    assert warn_of_known_texts(llm, ["new"]) is not None and not caplog.text


def test_texts_that_cannot_be_compared(llm: Path, texts: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (texts / INDEX_NAME).write_bytes(b"PAR1")
    assert warn_of_known_texts(llm, KNOWN) is None
    assert "its training texts cannot be compared" in caplog.text and "unreadable index" in caplog.text
    (texts / "manifest.json").unlink()
    assert warn_of_known_texts(llm, KNOWN) is None
    assert f"its training texts ({texts}) no longer exist" in caplog.text


def test_a_stage_tells_it_once_before_training(llm: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe: Any = SimpleNamespace(data=DataConfig(train=[SourceConfig(shards="x")]))
    videos = [SimpleNamespace(shard_set=SimpleNamespace(manifest=SimpleNamespace(kind="video")))]
    train, dev = (
        SimpleNamespace(samples=SimpleNamespace(column=lambda _, t=t: pa.chunked_array([t])), sources=videos)
        for t in (KNOWN, ["sun", "new"])
    )
    settings = SimpleNamespace(backbone_config={}, rows_fingerprint="", reads_frames=True, pose_layout="")
    encoder: Any = SimpleNamespace(config=settings)
    for rank in (1, 0):
        context = StageContext(recipe, rank, 2, torch.device("cpu"))
        check_video(context, Plans(train, [dev]), encoder, str(llm))  # type: ignore[arg-type, list-item]
    assert caplog.text.count("1 of 2 evaluation texts are among") == 1
    assert json.dumps(warn_of_known_texts(llm, ["sun"]))
