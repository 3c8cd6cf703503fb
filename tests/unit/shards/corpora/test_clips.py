"""CSL-News and DailyMoth-70h: clips that are cut already, in the layouts they are published in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shards.build.build import BuildOptions, build
from shards.corpora import make_corpus
from shards.corpora.csl_news import CslNews
from shards.corpora.dailymoth import DailyMoth
from shards.errors import DataError
from shards.inspect.lint import lint
from shards.schema import Segment, VideoFile
from tests.unit.shards.making import mp4, pictures


@pytest.fixture(scope="module")
def movie() -> bytes:
    return mp4(pictures(8))


@pytest.fixture
def news(tmp_path: Path, movie: bytes) -> Path:
    names = ["Common-Concerns_20200101_0-100_1", "20200102_Dragon-TV__0-100_2"]
    for number, name in enumerate(names, 1):
        folder = tmp_path / "videos" / f"archive_{number:03d}"
        folder.mkdir(parents=True)
        (folder / f"{name}.mp4").write_bytes(movie)
    labels = [{"video": f"{name}.mp4", "pose": f"{name}.pkl", "text": "共同关注。"} for name in names]
    (tmp_path / "CSL_News_Labels.json").write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
    return tmp_path


class TestCslNews:
    def test_build(self, news: Path) -> None:
        corpus = make_corpus("csl_news", {"labels": f"{news}/CSL_News_Labels.json", "videos": f"{news}/videos"})
        first, second = corpus.segments()
        path = news / "videos/archive_001/Common-Concerns_20200101_0-100_1.mp4"
        assert first == Segment(
            "csl_news", path.stem, "train", "共同关注。", VideoFile(path), "zh", "csl",
            origin=f"{news}/CSL_News_Labels.json:record 1",
        )  # fmt: skip
        assert second.id == "20200102_Dragon-TV__0-100_2" and CslNews.published == {"train": 722711}
        assert build(corpus, news / "set", BuildOptions()).splits == {"train": 2} and lint(news / "set").ok

    def test_missing_archives_are_missing_media(self, news: Path) -> None:
        next((news / "videos/archive_002").iterdir()).unlink()
        manifest = build(
            CslNews(news / "CSL_News_Labels.json", news / "videos"),
            news / "set",
            BuildOptions(max_skipped_fraction=0.5),
        )
        assert manifest.counts["skipped/missing_media"] == 1

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"video": "a.mp4", "label": "x"}, r"record 1: no field 'text'; found \['label', 'video'\]"),
            ({"video": ["a", 3], "text": "x"}, "record 1: video is a list, not text"),
            ({"video": "a.mp4", "text": 3}, "record 1: text is a int, not text"),
            ({"video": "", "text": "x"}, "record 1: '' cannot name a file"),
        ],
    )
    def test_other_labels(self, news: Path, entry: dict[str, object], message: str) -> None:
        (news / "CSL_News_Labels.json").write_text(json.dumps([entry]))
        with pytest.raises(DataError, match=message):
            list(CslNews(news / "CSL_News_Labels.json", news / "videos").segments())

    def test_wrong_files(self, news: Path) -> None:
        with pytest.raises(DataError, match=r"not the JSON labels: 'CSL_News_Labels\.csv'"):
            CslNews(news / "CSL_News_Labels.csv", news / "videos")
        with pytest.raises(DataError, match="no such folder; looked for the unpacked mp4 files of the archives"):
            CslNews(news / "CSL_News_Labels.json", news / "gone")


@pytest.fixture
def moth(tmp_path: Path, movie: bytes) -> Path:
    root = tmp_path / "dailymoth-70h"
    (root / "manifests").mkdir(parents=True)
    for split, number in (("train", 4), ("val", 5), ("test", 100_006)):
        name = f"{number:07d}-2022.6.14.mp4"
        for kind in ("unblurred", "blurred"):
            folder = root / f"{kind}_clips" / "videos" / name[:5]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(movie)
        (root / "manifests" / f"{split}.tsv").write_text(f'{name}\t0.32\tHe said "{split}".\n', encoding="utf-8")
    return root


class TestDailyMoth:
    def test_build(self, moth: Path) -> None:
        corpus = DailyMoth(moth)
        first, *_ = corpus.segments()
        path = moth / "unblurred_clips/videos/00000/0000004-2022.6.14.mp4"
        assert first == Segment(
            "dailymoth", "0000004-2022.6.14", "train", 'He said "train".', VideoFile(path), "en", "ase", "daily_moth",
            origin=f"{moth}/manifests/train.tsv:1",
        )  # fmt: skip
        manifest = build(corpus, moth / "set", BuildOptions())
        assert manifest.splits == {"dev": 1, "test": 1, "train": 1} and lint(moth / "set").ok

    def test_variants(self, moth: Path, movie: bytes) -> None:
        blurred = make_corpus("dailymoth", {"root": str(moth), "clips": "blurred", "splits": "dev"})
        (segment,) = blurred.segments()
        assert isinstance(segment.media, VideoFile) and "/blurred_clips/" in str(segment.media.path)
        manifest = moth / "manifests/test.tsv"
        manifest.write_text("video_name\tduration\tcaption\nflat\t1.5e-1\tx\n\ngone\t3\ty\n")
        (moth / "unblurred_clips/videos/flat.mp4").write_bytes(movie)
        flat, gone = DailyMoth(moth, splits=["test"]).segments()
        assert flat.media == VideoFile(moth / "unblurred_clips/videos/flat.mp4")
        assert gone.media == VideoFile(moth / "unblurred_clips/videos/gone/gone.mp4")
        (moth / "unblurred_clips/videos").rename(moth / "unblurred_clips/00000")
        assert next(iter(DailyMoth(moth).segments())).media == VideoFile(
            moth / "unblurred_clips/00000/0000004-2022.6.14.mp4"
        )

    @pytest.mark.parametrize("row", ["a.mp4\tx", "a.mp4\tlong\tx", "a.mp4\t1\tx\ty", "a.mp4|1|x"])
    def test_other_columns(self, moth: Path, row: str) -> None:
        (moth / "manifests/test.tsv").write_text(row + "\n")
        with pytest.raises(
            DataError, match=r"test\.tsv:1: not name, duration and caption separated by tabs: \['a\.mp4"
        ):
            list(DailyMoth(moth, splits=["test"]).segments())

    def test_wrong_layout(self, moth: Path) -> None:
        with pytest.raises(DataError, match="no such clips: 'raw'\n  fix: use unblurred or blurred"):
            DailyMoth(moth, clips="raw")
        with pytest.raises(
            DataError, match=r"manifests: no manifest: looked for train\.tsv, val\.tsv, dev\.tsv, test\.tsv"
        ):
            DailyMoth(moth / "manifests")
        with pytest.raises(DataError, match=r"unknown split \['all'\]"):
            DailyMoth(moth, splits=["all"])
        (moth / "manifests/train.tsv").write_text("a/../../b.mp4\t1\tx\n\0.mp4\t1\tx\n")
        with pytest.raises(DataError, match=r"train\.tsv:2 name: .* cannot name a file"):
            list(DailyMoth(moth).segments())
