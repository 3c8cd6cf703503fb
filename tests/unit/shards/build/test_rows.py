"""Shard sets from files of features and keypoints: any corpus, files named by a template, one form per set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.build.build import BuildOptions, build
from shards.cli.build import BuildSettings, build_options
from shards.corpora.placed import Placed
from shards.corpora.synthetic import Synthetic, SyntheticOptions, generate
from shards.errors import DataError, OptionError
from shards.format.index import read_index
from shards.inspect.lint import lint
from shards.load.features import read_features
from shards.load.reader import Reader
from shards.media.poses import PoseFiles
from shards.media.rows import FeatureFiles
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.schema import RowsFile, Segment, VideoFile
from tests.unit.shards.cli.test_shards_cli import run
from tests.unit.shards.making import ListCorpus, text_corpus

FORM = FeatureFiles("i3d", "bsl5k", 4, 2.0)


def corpus(times: bool = False) -> ListCorpus:
    return ListCorpus(
        [
            Segment(
                "list", f"c.{number}", "train" if number else "dev", f"satz {number}",
                VideoFile(Path("videos/show.mp4"), *((number, number + 1.5) if times else ())), "de", "gsg",
            )
            for number in range(4)
        ]
    )  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for number in range(4):
        path = tmp_path / ("train" if number else "dev") / f"c.{number}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.full((10 + number, 4), number, np.float32))
    return tmp_path


def reader(out: Path, split: str = "train") -> Reader:
    return Reader(Plan([Source(read_index(out), split)], PlanOptions("clip", shuffle=False)))


def test_features_become_a_shard_set(files: Path) -> None:
    placed = Placed(corpus(), f"{files}/{{split}}/{{id}}.npy")
    manifest = build(placed, files / "set", BuildOptions(rows=FORM), 1)
    assert manifest.kind == "features" and manifest.splits == {"dev": 1, "train": 3}
    assert manifest.options["features"] == FORM.record() and "video" not in manifest.options
    read = reader(files / "set")
    assert [read_features(read, sample).tolist() for sample in range(3)] == [
        [[float(n)] * 4] * (10 + n) for n in (1, 2, 3)
    ]
    row = read.row(0)
    assert (row.frames, row.width, row.fps, row.text, row.duration_seconds) == (11, 4, 2.0, "satz 1", 5.5)
    assert read.meta(0)["id"] == "c.1"
    assert not lint(str(files / "set")).problems
    again = build(placed, files / "set", BuildOptions(rows=FORM), 1)
    assert again.fingerprint == manifest.fingerprint


def test_times_cut_a_file_of_a_whole_video(tmp_path: Path) -> None:
    np.save(tmp_path / "show.npy", np.arange(40, dtype=np.float32).reshape(10, 4))
    build(Placed(corpus(times=True), f"{tmp_path}/{{media}}.npy"), tmp_path / "set", BuildOptions(rows=FORM), 1)
    read = reader(tmp_path / "set")
    assert [read_features(read, sample)[:, 0].tolist() for sample in range(3)] == [
        [8, 12, 16], [16, 20, 24], [24, 28, 32]
    ]  # fmt: skip


def test_segments_whose_own_media_are_the_files(files: Path) -> None:
    own = ListCorpus([Segment("list", "a", "train", "satz", VideoFile(files / "train" / "c.1.npy"))])
    (segment,) = Placed(own, "").segments()
    assert segment.media == RowsFile(files / "train" / "c.1.npy")


def test_missing_and_unusable_files_are_counted(files: Path) -> None:
    (files / "train" / "c.1.npy").unlink()
    np.save(files / "train" / "c.2.npy", np.zeros((3, 5)))
    placed = Placed(corpus(), f"{files}/{{split}}/{{id}}.npy")
    manifest = build(placed, files / "set", BuildOptions(rows=FORM, max_skipped_fraction=0.5), 1)
    counts = {"samples": 2, "skipped": 2, "skipped/missing_media": 1, "skipped/unreadable_media": 1}
    assert manifest.counts == counts
    lines = [json.loads(line) for line in (files / "set" / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["c.1", "c.2"] and "does not exist" in lines[0]["detail"]
    with pytest.raises(DataError, match=r"2 of 4 segments cannot be used.*missing_media.*unreadable_media"):
        build(placed, files / "strict", BuildOptions(rows=FORM), 1)


@pytest.mark.parametrize("template", ["feats/{split}.npy", "feats/{name}/{id}.npy", "feats/{id.npy"])
def test_templates_that_name_no_file_per_segment(template: str) -> None:
    with pytest.raises(OptionError, match="does not name a file per segment"):
        Placed(corpus(), template)


def test_texts_have_no_files() -> None:
    with pytest.raises(OptionError, match="the segments are texts without media"):
        next(Placed(text_corpus(2), "{id}.npy").segments())


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signs") / "corpus"
    options = SyntheticOptions(
        train=4, dev=1, test=1, test_signer=1, text_train=10, text_dev=2, size=32, poses=True
    )  # fmt: skip
    generate(folder, options, 1)
    return folder


def test_keypoints_of_the_synthetic_corpus(signs: Path, tmp_path: Path) -> None:
    form = PoseFiles("synthetic", 12.5)
    placed = Placed(Synthetic(signs), f"{signs}/poses/{{id}}.npy")
    manifest = build(placed, tmp_path / "set", BuildOptions(rows=form), 1)
    assert manifest.splits == {"dev": 1, "test": 1, "test_signer": 1, "train": 4}
    read = reader(tmp_path / "set")
    frames = [json.loads(line)["frames"] for line in (signs / "segments.jsonl").read_text().splitlines()]
    assert [read.row(sample).frames for sample in range(4)] == frames[:4]
    joints_TJC = read_features(read, 0).astype(np.float32).reshape(frames[0], 30, 3)
    np.testing.assert_allclose(joints_TJC[:, :2, :2], [[[0.5, 0], [-0.5, 0]]] * frames[0], atol=2e-3)
    assert (joints_TJC[..., 2] == 1).all()
    wrists_T = joints_TJC[:, 4, 1]  # the left hand rests below the shoulders at both ends
    assert wrists_T[0] > 1 and wrists_T[-1] > 1


def test_from_the_command_line(signs: Path, tmp_path: Path) -> None:
    words = ["build", "synthetic", "--root", signs, "--out", tmp_path / "set", "--rows", f"{signs}/poses/{{id}}.npy"]
    result = run(*words, "--rows-are", "layout=synthetic", "--rows-are", "rate=12.5", "--workers", "1")
    assert result.exit_code == 0, result.output
    assert read_index(tmp_path / "set").manifest.options["features"]["layout"] == "synthetic"
    result = run("synth", "--out", tmp_path / "c", "--workers", 1, "--poses", *[
        word for name in ("train", "dev", "test", "test_signer") for word in ("--set", f"{name}=1")
    ], "--set", "text_train=5", "--set", "text_dev=1")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "4 videos and poses of 64 pixels at 12.5 fps" in result.stdout
    assert len(list((tmp_path / "c" / "poses").glob("*.npy"))) == 4


def test_forms_from_the_command_line() -> None:
    def form(rows: str | None, *pairs: str) -> Any:
        return build_options(BuildSettings(rows=rows, rows_form=list(pairs))).rows

    assert form(None) is None
    assert form("{id}.npy", "kind=i3d", "fingerprint=bsl5k", "width=4", "rate=2") == FORM
    assert form("{id}.npy", "layout=openpose", "rate=25", "columns=xy") == PoseFiles("openpose", 25.0, "xy")
    with pytest.raises(OptionError, match="--rows and --rows-are belong together"):
        form("{id}.npy")
    with pytest.raises(OptionError, match="fingerprint, width, rate missing"):
        form("{id}.npy", "kind=i3d")
    with pytest.raises(OptionError, match="unknown option 'pool'"):
        form("{id}.npy", "kind=i3d", "pool=cls")
