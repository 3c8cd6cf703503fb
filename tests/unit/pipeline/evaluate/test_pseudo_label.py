"""Pseudo-labels: a column of a model's own translations, and training plans that take it as their texts."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from pipeline.config.schema import DataConfig, SourceConfig
from pipeline.errors import RecipeError
from pipeline.evaluate.cli import register
from pipeline.evaluate.pseudo_label import LabelOptions, pseudo_label
from pipeline.evaluate.report import read_predictions
from pipeline.evaluate.run import EvalRanks, EvaluateOptions, evaluate_export
from pipeline.inference.clips import CollatePrompts, FetchFrames
from pipeline.inference.confidence import confidences
from pipeline.inference.generate import GenerationOptions
from pipeline.inference.load import load_export
from pipeline.stages.data import open_plan
from shards.build.build import BuildOptions, build
from shards.errors import DataError, OptionError
from shards.format.index import read_index, with_numbered_names
from shards.format.text_columns import open_column, with_texts
from shards.inspect.lint import LintOptions, lint
from shards.load.reader import Reader
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.schema import Segment
from tests.unit.pipeline.exported import FORM, TinyCorpus

SEARCH = GenerationOptions(max_new_tokens=4)


class Unlabelled(TinyCorpus):
    """The same clips, of which nobody knows the texts."""

    def segments(self) -> Iterator[Segment]:
        for segment in super().segments():
            yield dataclasses.replace(segment, text="", split="train")


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    options = BuildOptions(video=FORM, samples_per_shard=3, unlabelled=True)
    build(Unlabelled(tmp_path / "media"), tmp_path / "unlabelled", options)
    return tmp_path / "unlabelled"


def test_labels_are_the_translations(export_dir: Path, shard_dir: Path, unlabelled: Path, tmp_path: Path) -> None:
    report = pseudo_label(export_dir, unlabelled, LabelOptions(generation=SEARCH))
    assert report is not None and (report.samples, report.labelled + report.without_text) == (7, 7)
    evaluate_export(export_dir, [shard_dir], tmp_path / "scores", EvaluateOptions(generation=SEARCH))
    expected = [p.hypothesis for p in read_predictions(tmp_path / "scores" / "predictions.parquet")]
    column = open_column(read_index(unlabelled), "pseudo_label")
    assert [column.texts(row) for row in range(7)] == [[text] if text else [] for text in expected]
    assert all(0 < score <= 1 for row in range(7) for score in column.scores(row))
    assert column.about["split"] == "train" and not list(unlabelled.glob(".*labelling*"))


def test_ranks_share_the_samples(export_dir: Path, unlabelled: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(unlabelled, tmp_path / "other"))
    pseudo_label(export_dir, unlabelled, LabelOptions(generation=SEARCH))
    options = LabelOptions(generation=SEARCH)
    with pytest.raises(DataError, match="rank 1 of 2 left no labels"):
        pseudo_label(export_dir, other, options, EvalRanks(0, 2))
    assert pseudo_label(export_dir, other, options, EvalRanks(1, 2)) is None
    pseudo_label(export_dir, other, options, EvalRanks(0, 2))
    alone, shared = (open_column(read_index(folder), "pseudo_label") for folder in (unlabelled, other))
    assert alone.fingerprint == shared.fingerprint


def test_unsure_labels_are_left_out(export_dir: Path, unlabelled: Path) -> None:
    pseudo_label(export_dir, unlabelled, LabelOptions(generation=SEARCH))
    column = open_column(read_index(unlabelled), "pseudo_label")
    scores = sorted(score for row in range(7) for score in column.scores(row))
    least = (scores[2] + scores[3]) / 2
    report = pseudo_label(export_dir, unlabelled, LabelOptions("sure", min_score=least, generation=SEARCH))
    assert report is not None and (report.labelled, report.below_min_score) == (len(scores) - 3, 3)
    assert report.mean_score == pytest.approx(sum(scores[3:]) / len(scores[3:]), abs=1e-6)


@torch.no_grad()
def test_confidence_is_the_probability_of_the_text(export_dir: Path, shard_dir: Path) -> None:
    """Token by token, each clip alone, against one padded batch."""
    model, processor = load_export(export_dir)
    plan = Plan([Source(read_index(shard_dir), "test")], PlanOptions("clip", shuffle=False, max_frames=10))
    collate = CollatePrompts(processor, model.visual.config.clip_sizes())
    items = [FetchFrames(10, 2, 32)(Reader(plan), plan.epoch(0).item(number)) for number in range(3)]
    texts = ["rain in the north", "sun", "the rain"]
    together = confidences(model, processor, collate(items), texts)
    for item, text, found in zip(items, texts, together, strict=True):
        batch = collate([item])
        ids, product = batch["input_ids"], 1.0
        answer = processor.answer_ids(text)
        for token in answer:
            logits = model(ids, torch.ones_like(ids), batch["frames_NHWC"], layout=batch["layout"]).logits
            product *= float(torch.softmax(logits[0, -1].double(), -1)[token])
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert found == pytest.approx(product ** (1 / len(answer)), rel=1e-4)


def test_a_plan_takes_labels_as_its_texts(export_dir: Path, shard_dir: Path, unlabelled: Path) -> None:
    pseudo_label(export_dir, unlabelled, LabelOptions(generation=SEARCH))
    column = open_column(read_index(unlabelled), "pseudo_label")
    labelled = {row: column.texts(row)[0] for row in range(7) if column.texts(row)}
    data = DataConfig(
        train=[
            SourceConfig(shards=str(shard_dir), split="test"),
            SourceConfig(shards=str(unlabelled), text="pseudo_label", weight=0.5),
        ]
    )
    plan = open_plan(data, data.train, PlanOptions("clip", shuffle=False))
    assert plan.samples.counts == (7, len(labelled))
    found = {plan.samples.place(sample)[1]: plan.samples.row(sample).text for sample in range(7, len(plan.samples))}
    assert found == labelled
    assert plan.samples.column("text").to_pylist()[7:] == list(labelled.values())
    again = pickle.loads(pickle.dumps(plan))  # as a loader worker opens it
    assert again.samples.row(7).text == plan.samples.row(7).text and again.fingerprint == plan.fingerprint
    assert "text=pseudo_label" in str(plan.identity)
    other = [SourceConfig(shards=str(shard_dir), split="test"), SourceConfig(shards=str(shard_dir), split="test")]
    assert plan.fingerprint != open_plan(data, other, PlanOptions("clip", shuffle=False)).fingerprint


def test_a_large_index_has_its_names_numbered(export_dir: Path, unlabelled: Path) -> None:
    pseudo_label(export_dir, unlabelled, LabelOptions(generation=SEARCH))
    shard_set = read_index(unlabelled)
    column = open_column(shard_set, "pseudo_label")
    numbered = with_texts(dataclasses.replace(shard_set, table=with_numbered_names(shard_set.table)), column)
    plain = with_texts(shard_set, column)
    for name in ("split", "text", "text_hash", "tokens", "frames"):
        assert numbered.table[name].to_pylist() == plain.table[name].to_pylist()


def test_unlabelled_clips_need_a_column(unlabelled: Path) -> None:
    data = DataConfig(train=[SourceConfig(shards=str(unlabelled))])
    with pytest.raises(RecipeError, match="was built without needing texts; say which text column to learn"):
        open_plan(data, data.train, PlanOptions("clip"))
    assert lint(unlabelled, LintOptions()).ok
    named = DataConfig(train=[SourceConfig(shards=str(unlabelled), text="labels")])
    with pytest.raises(DataError, match="no text column 'labels'"):
        open_plan(named, named.train, PlanOptions("clip"))


def test_what_cannot_be_labelled(export_dir: Path, unlabelled: Path) -> None:
    with pytest.raises(RecipeError, match=r"--min-score 1.5: confidences lie between 0 and 1"):
        LabelOptions(min_score=1.5)
    with pytest.raises(OptionError, match="'A b' is no name of a column"):
        pseudo_label(export_dir, unlabelled, LabelOptions("A b"))
    pseudo_label(export_dir, unlabelled, LabelOptions(generation=SEARCH))
    with pytest.raises(OptionError, match="the column exists"):
        pseudo_label(export_dir, unlabelled, LabelOptions(generation=SEARCH))
    pseudo_label(export_dir, unlabelled, LabelOptions(generation=SEARCH, replace=True))


def test_the_command(export_dir: Path, unlabelled: Path) -> None:
    app = typer.Typer()
    register(app)
    command = ["pseudo-label", str(unlabelled), "--model", str(export_dir), "--set", "max_new_tokens=4"]
    result = CliRunner().invoke(app, [*command, "--min-score", "0.01"], catch_exceptions=False)
    assert result.exit_code == 0 and "of 7 samples labelled (mean confidence" in result.stdout
    machine = CliRunner().invoke(app, [*command, "--replace", "--json"], catch_exceptions=False)
    assert json.loads(machine.stdout)["samples"] == 7
