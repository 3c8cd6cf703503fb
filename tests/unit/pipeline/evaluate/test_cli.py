"""`slt evaluate` and `slt translate` as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from pipeline.errors import RecipeError
from pipeline.evaluate.cli import register
from pipeline.evaluate.options import PlaceOptions, parse_between, parse_sets
from pipeline.evaluate.run import EvaluateOptions
from pipeline.inference.load import VIDEO_FORM
from shards.corpora.captions import read_captions
from tests.unit.films import write_film


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    register(app)
    return app


def test_evaluate(app: typer.Typer, export_dir: Path, shard_dir: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(export_dir), "--shards", str(shard_dir), "--out", str(tmp_path)]
    sets = ["--set", "num_beams=2", "--set", "max_new_tokens=3", "--set", "micro_batch=4"]
    result = CliRunner().invoke(app, [*command, *sets, "--protocol", "phoenix14t"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "7 samples, protocol phoenix14t" in result.output and "nrefs:1|case:lc" in result.output
    machine = CliRunner().invoke(app, [*command, *sets, "--json"], catch_exceptions=False)
    assert json.loads(machine.stdout)["protocol"] == "default"


@pytest.fixture
def video(tmp_path: Path) -> Path:
    video = tmp_path / "any.mkv"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 8 * number, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return video


def test_translate(app: typer.Typer, export_dir: Path, video: Path) -> None:
    command = ["translate", str(video), "--model", str(export_dir), "--set", "max_new_tokens=3", "--json"]
    whole = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout.splitlines()[-1])
    part = json.loads(
        CliRunner().invoke(app, [*command, "--between", "0.2-0.6"], catch_exceptions=False).stdout.splitlines()[-1]
    )
    assert whole["path"] == str(video) and isinstance(whole["text"], str)
    assert (whole["duration_seconds"], part["duration_seconds"]) == (pytest.approx(1.0), pytest.approx(0.4))
    assert part["frames"] < whole["frames"]
    other = [*command[:-1], "--prompt", "text: {video} signs:"]
    assert CliRunner().invoke(app, other, catch_exceptions=False).exit_code == 0


def test_a_bad_video_does_not_stop_the_others(app: typer.Typer, export_dir: Path, video: Path, tmp_path: Path) -> None:
    broken, absent = tmp_path / "broken.mp4", tmp_path / "absent.mp4"
    broken.write_bytes(b"no video at all")
    command = ["translate", *map(str, (video, broken, tmp_path, absent, video))]
    result = CliRunner().invoke(app, [*command, "--model", str(export_dir), "--set", "max_new_tokens=3"])
    assert result.exit_code == 4
    assert [line.partition("\t")[0] for line in result.stdout.splitlines()] == [str(video)] * 2
    told = result.stderr
    assert f"error: {broken}: not a readable video" in told
    assert f"error: {tmp_path}: this is a folder, not a video\n  fix: name the files in it" in told
    assert f"error: {absent}: the file does not exist\n  fix: fetch the file, or check the path" in told
    assert told.splitlines()[-1] == f"3 of 5 videos are not translated: {broken}, {tmp_path}, {absent}"
    assert "annotation" not in told and " row" not in told


def test_times_outside_a_video_are_told_without_annotations(app: typer.Typer, export_dir: Path, video: Path) -> None:
    command = ["translate", str(video), "--model", str(export_dir), "--between", "5-6", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 4 and "fix: check the times" in result.stderr and "annotation" not in result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["error"].startswith("the video ends at 1.00 s")


def test_help_ends_with_an_example(app: typer.Typer) -> None:
    for verb in ("evaluate", "translate"):
        assert f"Example: slt {verb} " in CliRunner().invoke(app, [verb, "--help"]).output


def test_settings() -> None:
    given = EvaluateOptions(split="dev")
    generation, options = parse_sets(["num_beams=2", "length_penalty=0.6", "corpus=a", "micro_batch=3"], given)
    assert (generation.num_beams, generation.length_penalty) == (2, 0.6)
    assert options == EvaluateOptions(split="dev", corpus="a", micro_batch=3)
    assert parse_sets([], PlaceOptions())[0].num_beams == 4


def test_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_sets(["beams=3", "max_new_tokens=many", "precision=fp8", "workers", "synced=1", "split=dev"],
                   EvaluateOptions(), reserved=("split",))  # fmt: skip
    lines = str(caught.value).splitlines()
    assert "`beams` is not a setting; did you mean `num_beams`?" in lines[0]
    assert "--set max_new_tokens=many: invalid literal" in lines[1]
    assert "--set precision=fp8: unknown precision, not one of auto, fp32, bf16" in lines[2]
    assert "--set workers: no `=`" in lines[3]
    assert "`synced` is not a setting" in lines[4] and "`split` is not a setting" in lines[5]


@pytest.mark.parametrize(
    ("text", "times"), [(None, (None, None)), ("1.5-3", (1.5, 3.0)), ("2-", (2.0, None)), ("-4", (None, 4.0))]
)
def test_between(text: str | None, times: tuple[float | None, float | None]) -> None:
    assert parse_between(text) == times


@pytest.mark.parametrize("text", ["5", "3-2", "a-b", "1-2-3"])
def test_wrong_times(text: str) -> None:
    with pytest.raises(RecipeError, match="give increasing seconds such as"):
        parse_between(text)


@pytest.fixture
def long_command(export_dir: Path, tmp_path: Path) -> list[str]:
    """`slt translate FILM --long` for the tiny model, which takes four seconds of this rate at once."""
    write_film(tmp_path / "film.mp4", 2)
    served = Path(shutil.copytree(export_dir, tmp_path / "served"))
    (served / VIDEO_FORM).write_text(json.dumps({"short_side": 64, "fps": 5.0}))
    return ["translate", str(tmp_path / "film.mp4"), "--long", "--model", str(served), "--set", "max_new_tokens=3"]


def test_a_long_video_becomes_subtitles(app: typer.Typer, long_command: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*long_command, "--out", str(tmp_path / "film.vtt")], catch_exceptions=False)
    captions = read_captions(tmp_path / "film.vtt")
    assert result.exit_code == 0 and f"{len(captions)} subtitles; left out: " in result.stderr
    stream = CliRunner().invoke(app, long_command, catch_exceptions=False)
    assert stream.stdout == (tmp_path / "film.vtt").read_text()
    lines = CliRunner().invoke(app, [*long_command, "--json"], catch_exceptions=False).stdout.splitlines()
    assert [json.loads(line)["text"] for line in lines] == [caption.text for caption in captions]
    again = [*long_command, "--out", str(tmp_path / "film.srt"), "--json"]
    assert json.loads(CliRunner().invoke(app, again, catch_exceptions=False).stdout)["subtitles"] == len(captions)


def test_given_times_of_a_long_video(app: typer.Typer, long_command: list[str], tmp_path: Path) -> None:
    (tmp_path / "times.tsv").write_text("start\tend\n1\t2\n2\t3.2\n90\t91\n")
    given = [*long_command, "--segments", str(tmp_path / "times.tsv"), "--json", "--set", "batch=2"]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert [(json.loads(line)["start"], json.loads(line)["end"]) for line in result.stdout.splitlines()] == [
        (pytest.approx(1, abs=0.1), pytest.approx(2, abs=0.1)),
        (pytest.approx(2, abs=0.1), pytest.approx(3.2, abs=0.1)),
    ]
    assert "1 given spans outside the video" in result.stderr


def test_a_long_video_from_a_stream(app: typer.Typer, long_command: list[str], tmp_path: Path) -> None:
    expected = CliRunner().invoke(app, long_command, catch_exceptions=False).stdout
    payload = Path(long_command[1]).read_bytes()
    streamed = CliRunner().invoke(app, ["translate", "-", *long_command[2:]], input=payload, catch_exceptions=False)
    assert streamed.stdout == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--between", "1-2"], "--long takes one video, and all of it"),
        (["--crop", "0.5,0,0.2,1"], "--crop 0.5,0,0.2,1: give left,top,right,bottom as fractions"),
        (["--crop", "half"], "--crop half: give left,top,right,bottom"),
        (["--set", "batch=0"], "--set batch=0: at least one sentence"),
        (["--set", "pause_secs=1"], "did you mean `pause_seconds`"),
    ],
)
def test_long_options_that_cannot_work(
    app: typer.Typer, long_command: list[str], more: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, [*long_command, *more])
    assert isinstance(result.exception, RecipeError) and message in str(result.exception)


def test_options_of_long_videos_need_long(app: typer.Typer, long_command: list[str]) -> None:
    command = [word for word in long_command if word != "--long"]
    result = CliRunner().invoke(app, [*command, "--out", "a.vtt"])
    assert isinstance(result.exception, RecipeError) and "belong to --long" in str(result.exception)
    result = CliRunner().invoke(app, [*long_command, "--pose", "a.npy"])
    assert isinstance(result.exception, RecipeError) and "--pose gives the keypoints of" in str(result.exception)
