"""Whole videos with an exported model: subtitled, shared over ranks, scored once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pipeline.errors import RecipeError
from pipeline.evaluate.cli import register
from pipeline.evaluate.options import LongOptions
from pipeline.evaluate.run import EvalRanks
from pipeline.evaluate.run_long import Videos, evaluate_long
from pipeline.inference.generate import GenerationOptions
from pipeline.inference.load import VIDEO_FORM
from pipeline.inference.translate import Translator
from shards.corpora.captions import read_captions
from shards.corpora.timed_texts import SubtitleFile
from shards.errors import DataError
from tests.unit.films import write_film

SETTINGS = (LongOptions(batch=2), GenerationOptions(max_new_tokens=3), "default")


@pytest.fixture(scope="module")
def served(export_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(export_dir, tmp_path_factory.mktemp("served") / "served"))
    (folder / VIDEO_FORM).write_text(json.dumps({"short_side": 64, "fps": 5.0}))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        times = write_film(folder / f"news{number}.mp4", 2, seed=number)
        with SubtitleFile(folder / f"news{number}.vtt") as subtitles:
            for start, end in times:
                subtitles.write(start, end, "the rain in the north")
            subtitles.write(0.0, 0.4, "[Music]")  # nobody signs it
    return folder


def test_ranks_share_the_videos(served: Path, videos: Path, tmp_path: Path) -> None:
    translator = Translator.from_export(served)
    alone = evaluate_long(translator, Videos(videos, videos), tmp_path / "alone", SETTINGS)
    assert alone is not None and (alone.number_of_videos, alone.segmentation.reference_segments) == (3, 6)
    assert alone.segmentation.segment_f1 > 60
    content = json.loads((tmp_path / "alone" / "scores.json").read_text())
    assert content["videos"] == ["news0", "news1", "news2"] and content["spans"]["pause_seconds"] == 0.5
    assert content["scores"]["segmentation"]["reference_segments"] == 6 and "bleu" in str(content["protocol"]).lower()
    out = tmp_path / "shared"
    assert evaluate_long(translator, Videos(videos, videos), out, SETTINGS, EvalRanks(1, 2)) is None
    assert evaluate_long(translator, Videos(videos, videos), out, SETTINGS, EvalRanks(0, 2)) == alone


def test_at_the_true_times(served: Path, videos: Path, tmp_path: Path) -> None:
    translator = Translator.from_export(served)
    scores = evaluate_long(translator, Videos(videos, videos, given_times=True), tmp_path, SETTINGS)
    assert scores is not None and scores.segmentation.segment_precision == 100
    assert all(caption.end_seconds > 0.4 for caption in read_captions(tmp_path / "subtitles" / "news0.vtt"))


def test_a_video_without_true_subtitles(served: Path, videos: Path, tmp_path: Path) -> None:
    shutil.copy(videos / "news0.mp4", tmp_path / "alone.mp4")
    translator = Translator.from_export(served)
    with pytest.raises(DataError, match=r"alone.mp4: the video has no true subtitles\n  fix: put alone\.vtt"):
        evaluate_long(translator, Videos(tmp_path, tmp_path), tmp_path / "out", SETTINGS)


def test_the_command(served: Path, videos: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    command = ["evaluate", str(served), "--long", str(videos), "--out", str(tmp_path), "--set", "max_new_tokens=3"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "3 videos, protocol default" in result.stdout and "sentence by sentence" in result.stdout
    assert " subtitles for 6 sentences" in result.stdout and "signing and rest: IoU" in result.stdout
    machine = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert json.loads(machine.stdout)["number_of_videos"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either the samples of --shards or the whole videos of --long: give one"),
        (["--shards", "a", "--long", "b"], "either the samples of --shards or the whole videos of --long: give one"),
        (["--long", "a", "--pose", "b"], "--pose gives the keypoints of single clips; --long takes models that read"),
        (["--shards", "a", "--given-times"], "--given-times and --crop belong to --long"),
        (["--shards", "a", "--language", "de"], "--language and --sign-language belong to --long: a sample"),
    ],
)
def test_options_that_do_not_go_together(served: Path, options: list[str], message: str) -> None:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["evaluate", str(served), *options])
    assert isinstance(result.exception, RecipeError) and message in str(result.exception)
