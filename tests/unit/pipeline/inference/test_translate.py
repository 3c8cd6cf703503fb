"""Serving sees a video exactly as training did."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import CheckpointError, RecipeError
from pipeline.evaluate.report import read_predictions
from pipeline.evaluate.run import EvaluateOptions, FetchFrames, evaluate_export
from pipeline.inference.generate import GenerationOptions
from pipeline.inference.translate import VIDEO_FORM, Translator, read_video_form, translate_file
from shards.errors import DataError
from shards.format.index import read_index
from shards.load.reader import Reader
from shards.media.video import VideoOptions, transcode
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.schema import VideoFile
from tests.unit.pipeline.exported import FORM, PROMPT, TEXTS, write_frames

FAST = GenerationOptions(max_new_tokens=5)


@pytest.fixture
def served(export_dir: Path, tmp_path: Path) -> Path:
    """An export that says how its training videos were stored."""
    folder = Path(shutil.copytree(export_dir, tmp_path / "served"))
    (folder / VIDEO_FORM).write_text(json.dumps(dataclasses.asdict(FORM)))
    return folder


def test_frames_equal_those_of_the_shards(served: Path, shard_dir: Path, tmp_path: Path) -> None:
    translator = Translator.from_export(served)
    sizes = translator.processor.options
    plan = Plan([Source(read_index(shard_dir), "test")], PlanOptions("clip", shuffle=False))
    fetch = FetchFrames(sizes.max_frames, sizes.frame_stride, sizes.image_pixels)
    for number in (0, 6):
        video = tmp_path / f"{number}.mp4"
        video.write_bytes(transcode(write_frames(tmp_path / f"clip{number}", 6 + 3 * number, number), FORM))
        ((expected, row),) = fetch(Reader(plan), plan.epoch(0).item(number))
        assert row.text == TEXTS[number]
        np.testing.assert_array_equal(translator.read(VideoFile(video)), expected)


def test_texts_equal_those_of_the_evaluation(served: Path, shard_dir: Path, tmp_path: Path) -> None:
    evaluate_export(served, [shard_dir], tmp_path / "scores", EvaluateOptions(generation=FAST))
    expected = read_predictions(tmp_path / "scores" / "predictions.parquet")[2].hypothesis
    video = tmp_path / "2.mp4"
    video.write_bytes(transcode(write_frames(tmp_path / "clip2", 12, 2), FORM))
    assert translate_file(served, video, FAST) == expected
    one, two = Translator.from_export(served).translate([VideoFile(video), VideoFile(video, 0.0, 0.5)], FAST)
    assert (one.text, one.frames, one.duration_seconds) == (expected, 6, pytest.approx(1.2))
    assert (two.frames, two.duration_seconds) == (3, 0.5)
    assert one.to_dict()["path"] == str(video)


def test_another_prompt(served: Path, tmp_path: Path) -> None:
    translator = Translator.from_export(served)
    assert translator.processor.options.prompt == PROMPT
    other = translator.with_prompt("{video} text:")
    assert other.processor.prompt_ids(4) != translator.processor.prompt_ids(4) and other.model is translator.model
    with pytest.raises(RecipeError, match=r"must contain \{video\} exactly once"):
        translate_file(served, tmp_path / "any.mp4", prompt="no place for the video")


def test_an_export_without_the_form_says_what_is_assumed(export_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_video_form(export_dir) == VideoOptions()
    assert "assuming the defaults: 25 frames per second" in caplog.text


@pytest.mark.parametrize("content", ["[1]", '{"speed": 3}', "{"])
def test_a_damaged_form_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / VIDEO_FORM).write_text(content)
    with pytest.raises(CheckpointError, match=r"video_form\.json does not hold video options .*export the run again"):
        read_video_form(tmp_path)


def test_a_form_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    (tmp_path / VIDEO_FORM).write_text('{"fps": 12.5, "validate": "headers"}')
    assert read_video_form(tmp_path) == VideoOptions(fps=12.5)


def test_a_missing_video_is_a_data_error(served: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the file does not exist"):
        translate_file(served, tmp_path / "absent.mp4")
