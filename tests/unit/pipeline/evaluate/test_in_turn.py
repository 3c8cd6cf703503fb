"""Evaluation with the sentences before in the prompt: references, or the model's own translations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.evaluate.in_turn import Turns
from pipeline.evaluate.report import read_predictions
from pipeline.evaluate.run import EvalRanks, EvaluateOptions, evaluate_export
from pipeline.inference.cues import StatedCues
from pipeline.inference.generate import GenerationOptions
from pipeline.inference.translate import Translator
from pipeline.models.processing import CONFIG_NAME
from shards.errors import DataError
from shards.format.index import read_index
from shards.format.text_columns import write_column
from shards.media.video import transcode
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.schema import VideoFile
from tests.unit.pipeline.exported import FORM, TEXTS, write_frames

FAST = GenerationOptions(max_new_tokens=4)
BEFORE = [[], [0], [0, 1], [], [3], [3, 4], []]
"""Samples before each: two videos and a single sentence."""


def with_prompt(export: Path, folder: Path, **previous: object) -> Path:
    """The same model with the sentences before in its prompt."""
    copy = Path(shutil.copytree(export, folder))
    config = json.loads((copy / CONFIG_NAME).read_text())
    config |= {"prompt": "the {previous} signs: {video} text:", "prompts": {"previous": {"empty": "", **previous}}}
    (copy / CONFIG_NAME).write_text(json.dumps(config))
    return copy


def with_previous(shards: Path, folder: Path, texts: list[str]) -> Path:
    copy = Path(shutil.copytree(shards, folder))
    shard_set = read_index(copy)
    write_column(shard_set, "previous", [[texts[n] for n in before] for before in BEFORE], {})
    write_column(shard_set, "previous_ids", [[f"tiny/clip/{n}" for n in before] for before in BEFORE], {})
    return copy


def said(export: Path, shards: Path, out: Path, world_size: int = 1, previous: str | None = None) -> list[str]:
    options = EvaluateOptions(generation=FAST, micro_batch=2, previous=previous)
    for rank in reversed(range(world_size)):
        evaluate_export(export, [shards], out, options, EvalRanks(rank, world_size))
    return [prediction.hypothesis for prediction in read_predictions(out / "predictions.parquet")]


@pytest.mark.parametrize("count", [1, 2])
def test_own_translations_are_shown_as_they_would_be_as_references(
    count: int, export_dir: Path, shard_dir: Path, tmp_path: Path
) -> None:
    export = with_prompt(export_dir, tmp_path / "export", count=count, source="predicted")
    shards = with_previous(shard_dir, tmp_path / "shards", TEXTS)
    texts = said(export, shards, tmp_path / "one")
    content = json.loads((tmp_path / "one" / "scores.json").read_text())
    assert content["prompt"]["previous"] == "the model's own translations"
    assert content["prompt"]["previous_outside_the_split_as_references"] == 0
    for ranks in (2, 3):
        assert said(export, shards, tmp_path / f"ranks{ranks}", ranks) == texts
    as_references = with_previous(shard_dir, tmp_path / "spoken", texts)
    assert said(export, as_references, tmp_path / "again", previous="reference") == texts
    references = said(export, shards, tmp_path / "true", previous="reference")
    assert references != texts and references[0] == texts[0]
    content = json.loads((tmp_path / "true" / "scores.json").read_text())
    assert content["prompt"] == {"template": "the {previous} signs: {video} text:", "previous": "references"}


def test_a_translator_carries_the_sentences_before(export_dir: Path, shard_dir: Path, tmp_path: Path) -> None:
    export = with_prompt(export_dir, tmp_path / "export", source="predicted")
    texts = said(export, with_previous(shard_dir, tmp_path / "shards", TEXTS), tmp_path / "out")
    frames = write_frames(tmp_path / "clip1", 9, 1)
    video = tmp_path / "1.mp4"
    video.write_bytes(transcode(frames, FORM))
    translator = Translator.from_export(export)
    translator.form = FORM
    (found,) = translator.with_cues(StatedCues(previous=("rain", texts[0]))).translate([VideoFile(video)], FAST)
    assert found.text == texts[1]
    clip = translator.read(VideoFile(video))
    assert translator.translate_clips([clip], FAST, [texts[0]]) == [texts[1]]


def test_cues_that_are_not_stated_are_asked_for(export_dir: Path, tmp_path: Path) -> None:
    folder = with_prompt(export_dir, tmp_path / "export", empty=None)
    with pytest.raises(DataError, match=r"translate: connector.prompt shows \{previous\}, but there is none"):
        Translator.from_export(folder).with_cues(StatedCues())
    config = json.loads((folder / CONFIG_NAME).read_text())
    names = {"de": "rain", "en": "sun"}
    config |= {"prompt": "{language} {sign_language} {video} text:", "prompts": {"languages": names}}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    translator = Translator.from_export(folder)
    with pytest.raises(DataError, match=r"\{language\}, which is not stated\n  fix: say --language CODE: one of de"):
        translator.with_cues(StatedCues())
    with pytest.raises(DataError, match=r"\{sign_language\}, which is not stated\n  fix: say --sign-language CODE$"):
        translator.with_cues(StatedCues("de"))
    with pytest.raises(DataError, match=r"the language 'fr' has no name"):
        translator.with_cues(StatedCues("fr", "gsg"))
    assert translator.with_cues(StatedCues("de", "gsg")).with_prompt("{language} {video}").stated.language == "de"


def test_sentences_that_are_not_in_the_split_are_references(shard_dir: Path, tmp_path: Path) -> None:
    shards = with_previous(shard_dir, tmp_path / "shards", TEXTS)
    plan = Plan([Source(read_index(shards), "test", columns=("previous", "previous_ids"))], PlanOptions("clip"))
    turns = Turns(plan.samples, {"tiny/clip/1": 1, "tiny/clip/2": 2}, "previous", count=2)
    assert list(turns.of_rank(0, 1)) == [[1], [2]] and list(turns.of_rank(1, 2)) == []
    turns.said[1] = "said"
    assert turns.previous(2) == [TEXTS[0], "said"] and turns.references() == 2


def test_sentences_before_each_other_are_refused(shard_dir: Path, tmp_path: Path) -> None:
    shards = with_previous(shard_dir, tmp_path / "shards", TEXTS)
    ids = [["tiny/clip/1"], ["tiny/clip/0"], [], [], [], [], []]
    write_column(read_index(shards), "previous_ids", ids, {}, replace=True)
    plan = Plan([Source(read_index(shards), "test", columns=("previous", "previous_ids"))], PlanOptions("clip"))
    turns = Turns(plan.samples, {f"tiny/clip/{n}": n for n in range(7)}, "previous", count=1)
    with pytest.raises(DataError, match=r"tiny/clip/[01] comes before itself in the text column 'previous_ids'"):
        list(turns.of_rank(0, 1))


def test_a_source_that_is_none(export_dir: Path, shard_dir: Path, tmp_path: Path) -> None:
    for export, source in ((export_dir, "predicted"), (with_prompt(export_dir, tmp_path / "export"), "spoken")):
        with pytest.raises(RecipeError, match=rf"--set previous={source}: give reference or predicted, for a model"):
            evaluate_export(export, [shard_dir], tmp_path / "out", EvaluateOptions(previous=source))
