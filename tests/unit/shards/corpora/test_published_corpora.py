"""PHOENIX derivatives, CSL-Daily, How2Sign and OpenASL: true layouts, oddities, faults, and a build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shards.build.build import BuildOptions, build
from shards.corpora import make_corpus
from shards.corpora.csl_daily import CslDaily
from shards.corpora.how2sign import How2Sign
from shards.corpora.openasl import OpenAsl
from shards.corpora.phoenix14t import Phoenix14T
from shards.errors import DataError
from shards.schema import Crop, FrameFolder, VideoFile
from tests.unit.shards.corpora import layouts
from tests.unit.shards.corpora.layouts import built, segments_of


class TestPhoenixDerivatives:
    def test_gfslt_labels_with_official_frames(self, tmp_path: Path) -> None:
        layouts.gfslt(tmp_path)
        corpus = make_corpus("phoenix14t", {"root": str(tmp_path), "labels": str(tmp_path / "labels")})
        first, second = segments_of(corpus)
        assert (first.id, first.split, first.text, first.gloss) == (
            "a-1",
            "train",
            "regen im norden",
            "REGEN IM NORDEN",
        )
        assert isinstance(first.media, FrameFolder) and first.media.path.name == "a-1"
        assert first.origin.endswith("labels.train:train/a-1") and second.signer == ""
        rows = built(corpus, tmp_path)
        assert list(rows) == ["a-1"] and rows["a-1"].frames == 4

    def test_neccam_annotations_without_their_features(self, tmp_path: Path) -> None:
        entry = {
            "name": "dev/a-1",
            "signer": "Signer04",
            "gloss": "A B",
            "text": "am tag .",
            "sign": torch.ones(9, 1024),
        }
        layouts.pickled(tmp_path / "phoenix14t.pami0.dev", [entry])
        (segment,) = segments_of(Phoenix14T(tmp_path, labels=tmp_path))
        assert (segment.id, segment.text, segment.signer, segment.split) == ("a-1", "am tag", "Signer04", "dev")

    def test_slrt_labels_under_their_own_names(self, tmp_path: Path) -> None:
        entry = {"name": "test/a-1", "gloss": "A B", "text": "am tag", "num_frames": 9, "signer": "Signer04"}
        layouts.pickled(tmp_path / "phoenix-2014t.test", [entry])
        (segment,) = segments_of(Phoenix14T(tmp_path, labels=tmp_path))
        found = (segment.id, segment.text, segment.gloss, segment.signer, segment.split)
        assert found == ("a-1", "am tag", "A B", "Signer04", "test")
        with pytest.raises(
            DataError, match=r"no label file for dev; there are phoenix-2014t\.test\n  fix: fetch it, or"
        ):
            Phoenix14T(tmp_path, splits=["dev"], labels=tmp_path)

    def test_faults(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"holds none of labels\.train, phoenix14t\.pami0\.train, phoenix-2014t"):
            Phoenix14T(tmp_path, labels=tmp_path)
        path = layouts.pickled(tmp_path / "labels.train", [{"name": "train/../x", "text": "a", "gloss": ""}])
        with pytest.raises(DataError, match=rf"{path}:0: '\.\./x' cannot name a file"):
            segments_of(Phoenix14T(tmp_path, labels=tmp_path))
        layouts.pickled(tmp_path / "labels.train", [{"name": "train/x", "text": 3, "gloss": ""}])
        with pytest.raises(DataError, match=r"labels\.train:0: text is a int, not text"):
            segments_of(Phoenix14T(tmp_path, labels=tmp_path))
        layouts.pickled(tmp_path / "labels.train", [{"name": "train/x", "text": "\ud800", "gloss": ""}])
        with pytest.raises(DataError, match="text is broken text, not text"):
            segments_of(Phoenix14T(tmp_path, labels=tmp_path))


class TestCslDaily:
    @pytest.mark.parametrize("clips", [False, True])
    def test_the_two_entries_that_do_not_fit(self, tmp_path: Path, clips: bool) -> None:
        corpus = make_corpus("csl_daily", {"root": str(layouts.csl(tmp_path, clips)), "clips": str(clips)})
        found = {segment.id: segment for segment in segments_of(corpus)}
        assert {name: segment.excluded for name, segment in found.items()} == {
            "S000000_P0000_T00": "",
            "S000005_P0004_T00": "listed_not_annotated",
            "S000001_P0009_T01": "",
            "S000007_P0003_T00": "annotated_not_listed",
        }
        first = found["S000000_P0000_T00"]
        assert (first.text, first.gloss, first.signer, first.language) == ("他是谁？", "他 谁", "P0000", "zh")
        assert first.sign_language == "csl" and first.origin.endswith("csl2020ct_v2.pkl:info[0]")
        rows = built(corpus, tmp_path)
        assert {name: row.split for name, row in rows.items()} == {
            "S000000_P0000_T00": "train",
            "S000001_P0009_T01": "test",
        }
        seconds = 15 / 30 if clips else 4 / 30
        assert all(abs(row.duration_seconds - seconds) <= 1 / 25 for row in rows.values())

    def test_unlisted_to_train(self, tmp_path: Path) -> None:
        corpus = CslDaily(layouts.csl(tmp_path), unlisted_to_train=True, splits=["train"])
        usable = [segment.id for segment in segments_of(corpus) if not segment.excluded]
        assert usable == ["S000000_P0000_T00", "S000007_P0003_T00"] and corpus.settings == {"unlisted_to_train": True}

    @pytest.mark.parametrize("names", ["labels.{}", "csl-daily.{}"])
    def test_labels_of_derivatives(self, tmp_path: Path, names: str) -> None:
        entry = {"name": "S000000_P0000_T00", "gloss": ["他", "谁"], "text": "他 是 谁 ？", "video_path": "x.mp4"}
        layouts.pickled(tmp_path / names.format("train"), {entry["name"]: entry})
        layouts.pickled(tmp_path / names.format("dev"), [entry | {"name": "S000001_P0009_T01", "gloss": ""}])
        corpus = make_corpus("csl_daily", {"root": str(tmp_path), "labels": str(tmp_path), "clips": "true"})
        first, second = segments_of(corpus)
        assert (first.text, first.gloss, first.signer, first.split) == ("他是谁？", "他 谁", "P0000", "train")
        assert first.media == VideoFile(tmp_path / "sentence-crop/S000000_P0000_T00.mp4")
        assert (second.id, second.gloss, second.split, second.excluded) == ("S000001_P0009_T01", "", "dev", "")

    def test_video_map_says_the_same(self, tmp_path: Path) -> None:
        layouts.csl(tmp_path / "a")
        layouts.csl(tmp_path / "b", pickle_too=False)
        pairs = zip(segments_of(CslDaily(tmp_path / "a")), segments_of(CslDaily(tmp_path / "b")), strict=True)
        assert all((a.id, a.text, a.gloss, a.excluded) == (b.id, b.text, b.gloss, b.excluded) for a, b in pairs)

    def test_the_other_place_of_the_frames(self, tmp_path: Path) -> None:
        layouts.csl(tmp_path)
        (tmp_path / "sentence").rename(tmp_path / "sentence_frames-512x512")
        media = segments_of(CslDaily(tmp_path))[0].media
        assert media is not None and media.path.is_dir()

    def test_faults(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no sentence_label/csl2020ct_v2\.pkl and no sentence_label/video_map"):
            CslDaily(tmp_path)
        root = layouts.csl(tmp_path)
        with pytest.raises(DataError, match=r"frames_fps=0\.0 is no rate"):
            CslDaily(root, frames_fps=0.0)
        (root / "sentence_label/split_1.txt").rename(tmp_path / "kept.txt")
        with pytest.raises(DataError, match=r"no split_1\.txt beside the annotations\b.*\n  fix: fetch it from the"):
            segments_of(CslDaily(root))
        (tmp_path / "kept.txt").rename(root / "sentence_label/split_1.txt")
        with pytest.raises(DataError, match=r"csl_daily splits: unknown split \['val'\]\n  fix: choose from \['train'"):
            CslDaily(root, splits=["val"])
        splits, labels = root / "sentence_label/split_1.txt", root / "sentence_label/csl2020ct_v2.pkl"
        for lines, message in (
            (["name|split", "a|train", "b|valid"], r"split_1\.txt:3: split 'valid'"),
            (["name|split", "a|train", "a|test"], r"split_1\.txt:3: a is listed twice, first at .*split_1\.txt:2"),
            (["name|split", "a|train"], r"none of its 1 names is annotated"),
            (["name,split", "a,train"], r"split_1\.txt:1: the delimiter '\|' does not occur"),
            (["name|split", "a/b|train"], r"'a/b' cannot name a file"),
        ):
            layouts.text(splits, lines)
            with pytest.raises(DataError, match=message):
                segments_of(CslDaily(root))
        layouts.text(splits, ["name|split", "a|train"])
        entry = {"name": "a", "label_word": ["x"], "label_gloss": []}
        for content, message in (
            ([1], "no list of annotations under 'info'"),
            ({"info": [{"name": "a"}]}, r"info\[0\]: the entry lacks one of name, label_word"),
            ({"info": [entry, entry]}, r"info\[1\]: a is annotated twice, first at .*info\[0\]"),
            ({"info": [entry | {"label_word": [3]}]}, "label_word is a list, not text"),
        ):
            layouts.pickled(labels, content)
            with pytest.raises(DataError, match=message):
                segments_of(CslDaily(root))

    def test_another_listed_name_without_annotation_counts_against_the_build(self, tmp_path: Path) -> None:
        root = layouts.csl(tmp_path)
        layouts.text(root / "sentence_label/split_1.txt", ["name|split", "S000000_P0000_T00|train", "S9_P1_T1|train"])
        assert [(s.text, s.excluded) for s in segments_of(CslDaily(root))][1] == ("", "")


class TestHow2Sign:
    def test_whole_videos_are_cut_at_the_realigned_times(self, tmp_path: Path) -> None:
        corpus = make_corpus("how2sign", {"root": str(layouts.how2sign(tmp_path))})
        dash, quoted, plain = segments_of(corpus)
        assert dash.id == "-fZc293MpJk_0-1-rgb_front" and dash.signer == "1" and quoted.signer == "10"
        assert quoted.text == "You can't decide, \"You know what?" and plain.text == 'A "plain" one'
        assert quoted.media == VideoFile(tmp_path / "raw_videos/G42xKICVj9U-10-rgb_front.mp4", 0.2, 1.0)
        rows = built(corpus, tmp_path, allowed=0.0)
        assert [rows[segment.id].frames for segment in (dash, quoted, plain)] == [12, 20, 10]
        assert corpus.splits == ["train"] and not corpus.notes  # type: ignore[attr-defined]

    def test_original_times_and_clips_only_on_request(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        layouts.how2sign(tmp_path, "val", realigned=False)
        with pytest.raises(DataError, match=r"no how2sign_realigned_train\.csv below it\n  fix: download 'English Tr"):
            How2Sign(tmp_path)
        assert segments_of(How2Sign(tmp_path, realigned=False))[0].split == "dev"
        layouts.text(tmp_path / "how2sign_train.csv", ["x"])
        with pytest.raises(DataError, match="with realigned=false the original annotations found there"):
            How2Sign(tmp_path)
        assert not caplog.records
        clips = How2Sign(tmp_path, splits=["dev"], realigned=False, clips=True, videos=tmp_path / "clips")
        assert segments_of(clips)[0].media == VideoFile(tmp_path / "clips/-fZc293MpJk_0-1-rgb_front.mp4")
        assert "pre-cut clips follow the original times" in caplog.text and "pre-cut clips" in clips.notes[0]

    def test_label_files_name_clips(self, tmp_path: Path) -> None:
        name = "--7E2sU6zP4_10-5-rgb_front"
        entry = {"name": f"{name}.mp4", "gloss": "", "text": "And I call them.", "video_path": f"{name}.mp4"}
        layouts.pickled(tmp_path / "labels.train", {entry["name"]: entry})
        layouts.video(tmp_path / "train_rgb_front_clips/raw_videos" / f"{name}.mp4", frames=10)
        with pytest.raises(DataError, match="label files hold no times, so whole videos cannot be cut"):
            How2Sign(tmp_path, labels=tmp_path)
        rows = built(How2Sign(tmp_path, labels=tmp_path, clips=True), tmp_path)
        assert rows[name].signer == "5" and rows[name].frames == 10
        with pytest.raises(DataError, match=r"holds no labels\.train"):
            How2Sign(tmp_path, labels=tmp_path / "x", clips=True)

    @pytest.mark.parametrize(
        "folder", ["video_level/train/rgb_front/raw_videos", "train_raw_videos", "train/raw_videos"]
    )
    def test_usual_folders(self, tmp_path: Path, folder: str) -> None:
        layouts.how2sign(tmp_path)
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw_videos").rename(tmp_path / folder)
        table = tmp_path / "sentence_level/train/text/en/raw_text/re_aligned/how2sign_realigned_train.csv"
        table.parent.mkdir(parents=True)
        (tmp_path / table.name).rename(table)
        media = segments_of(How2Sign(tmp_path))[0].media
        assert media is not None and media.path.is_file() and media.path.is_relative_to(tmp_path / folder)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("\t0.2\t1.0\t", "\t\t1.0\t", r"train\.csv:3: a time is empty"),
            ("\t0.2\t1.0\t", "\t-1\t1.0\t", r"csv:3 START_REALIGNED: the time -1 is negative"),
            ("\t0.2\t", "\t", r"csv:3: 6 fields, the header has 7"),
            (
                "\t",
                ",",
                r"csv:1: the delimiter '\\t' does not occur in the header .*\n  fix: it looks separated by ','",
            ),
            ("\tSENTENCE\n", "\tTEXT\n", r"csv:1: no column 'SENTENCE'"),
            ("\tVIDEO_NAME", "\tVIDEO_ID", r"csv:1: the column 'VIDEO_ID' occurs twice|no column 'VIDEO_NAME'"),
            ("\tSENTENCE_ID", "\tVIDEO_ID", r"csv:1: the column 'VIDEO_ID' occurs twice"),
            ("-fZc293MpJk-1-rgb_front\t", "../x\t", r"csv:2: '\.\./x' cannot name a file"),
        ],
    )
    def test_faults(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        path = layouts.how2sign(tmp_path) / "how2sign_realigned_train.csv"
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            segments_of(How2Sign(tmp_path))

    def test_a_span_of_nothing_is_left_out(self, tmp_path: Path) -> None:
        path = layouts.how2sign(tmp_path) / "how2sign_realigned_train.csv"
        path.write_text(path.read_text(encoding="utf-8").replace("\t0.2\t1.0", "\t1.0\t1.0"), encoding="utf-8")
        assert [segment.excluded for segment in segments_of(How2Sign(tmp_path))] == ["", "no_duration", ""]

    def test_duplicated_ids(self, tmp_path: Path) -> None:
        path = layouts.how2sign(tmp_path) / "how2sign_realigned_train.csv"
        layouts.text(path, [*(lines := path.read_text(encoding="utf-8").splitlines()), lines[1]])
        with pytest.raises(DataError, match=r"csv:5: the id '-fZc.*' occurs twice, first at .*csv:2"):
            build(How2Sign(tmp_path), tmp_path / "set", BuildOptions())


class TestOpenAsl:
    def test_segments_and_squares(self, tmp_path: Path) -> None:
        corpus = make_corpus("openasl", {"root": str(layouts.openasl(tmp_path))})
        first, second, gone, boxless = segments_of(corpus)
        assert first.id == "abcdefghij1-00:00:00.000-00:00:00.480" and first.text == 'He said "hi'
        assert isinstance(first.media, VideoFile) and first.media.crop == Crop(0.2, 0.0, 0.7, 1.0, square=True)
        assert (second.split, second.media.start_seconds, second.media.end_seconds) == ("dev", 0.48, 1.0)  # type: ignore[union-attr]
        assert (gone.excluded, boxless.excluded) == ("", "no_box")
        rows = built(corpus, tmp_path)
        assert {name: row.frames for name, row in rows.items()} == {first.id: 12, second.id: 13}
        assert {row.width for row in rows.values()} == {row.height for row in rows.values()}, "not square"

    def test_whole_pictures_other_texts_and_splits(self, tmp_path: Path) -> None:
        root = layouts.openasl(tmp_path)
        (root / "data/bbox-v1.0.json").unlink()
        with pytest.raises(
            DataError, match=r"no data/bbox-v1\.0\.json below it\n  fix: fetch it, or add --boxes false"
        ):
            OpenAsl(root)
        segments = segments_of(OpenAsl(root, boxes=False, text="tokenized-text", splits=["test"]))
        assert [(s.text, s.excluded, s.media.crop) for s in segments] == [  # type: ignore[union-attr]
            ("gone.", "", None),
            ("no box.", "", None),
        ]

    @pytest.mark.parametrize("mark", [":", "%", "-", "_"])
    def test_labels_name_videos_and_times_in_any_spelling(self, tmp_path: Path, mark: str) -> None:
        root = layouts.openasl(tmp_path)
        official = segments_of(OpenAsl(root, splits=["train"]))[0]
        name = f"abcdefghij1-00{mark}00{mark}00.000-00{mark}00{mark}00.480"
        entry = {"name": f"{name}.mp4", "gloss": "", "text": "He said hi", "video_path": f"{name}.mp4"}
        layouts.pickled(tmp_path / "labels/labels.test", {entry["name"]: entry})
        (cut,) = segments_of(make_corpus("openasl", {"root": str(root), "labels": str(tmp_path / "labels")}))
        assert (cut.id, cut.media, cut.split, cut.text) == (official.id, official.media, "test", "He said hi")
        path = layouts.video(root / "video-clip" / f"{name}.mp4", frames=12)
        (root / "data/openasl-v1.0.tsv").unlink()
        (clip,) = segments_of(OpenAsl(root, labels=tmp_path / "labels", clips=True))
        assert (clip.id, clip.media) == (official.id, VideoFile(path))
        layouts.pickled(tmp_path / "labels/labels.test", [entry | {"video_path": f"test/{name}.mp4"}])
        nested = layouts.video(root / "video-clip/test" / f"{name}.mp4", frames=12)
        assert segments_of(OpenAsl(root, labels=tmp_path / "labels", clips=True))[0].media == VideoFile(nested)

    def test_labels_that_tell_no_times_need_clips(self, tmp_path: Path) -> None:
        layouts.openasl(tmp_path)
        layouts.pickled(tmp_path / "labels.train", [{"name": "clip7", "text": "a", "video_path": "part/clip7.mp4"}])
        with pytest.raises(DataError, match=r"the name 'clip7' tells no times, so whole videos cannot be cut by it"):
            segments_of(OpenAsl(tmp_path, labels=tmp_path))
        path = layouts.video(tmp_path / "mine/part/clip7.mp4", frames=5)
        (clip,) = segments_of(OpenAsl(tmp_path, labels=tmp_path, clips=True, videos=tmp_path / "mine"))
        assert clip.media == VideoFile(path) and clip.id == "clip7"
        layouts.pickled(tmp_path / "labels.train", [{"name": "clip7", "text": "a", "video_path": "../clip7.mp4"}])
        with pytest.raises(DataError, match=r"'\.\.' cannot name a file"):
            segments_of(OpenAsl(tmp_path, labels=tmp_path, clips=True))

    @pytest.mark.parametrize("mark", [":", "%", "-", "_"])
    def test_clips_under_any_name(self, tmp_path: Path, mark: str) -> None:
        root = layouts.openasl(tmp_path)
        (root / "data/bbox-v1.0.json").unlink()
        name = f"abcdefghij1-00{mark}00{mark}00.000-00{mark}00{mark}00.480.mp4"
        path = layouts.video(root / "video-clip" / name, frames=12)
        first, second, *_ = segments_of(OpenAsl(root, clips=True))
        assert first.media == VideoFile(path) and second.media is not None and ":" in second.media.path.name

    @pytest.mark.parametrize(
        ("file", "old", "new", "message"),
        [
            ("openasl-v1.0.tsv", "\ttrain", "\ttrian", r"openasl-v1\.0\.tsv:2: split 'trian'"),
            ("openasl-v1.0.tsv", "\t00:00:00.480\t", "\tsoon\t", r"tsv:2 end: 'soon' is not a time"),
            ("openasl-v1.0.tsv", "\traw-text", "\ten", "no column 'raw-text'"),
            ("bbox-v1.0.json", "[0.2", '["a"', r"bbox-v1\.0\.json: abc.*: \['a', .* are not four fractions"),
            ("bbox-v1.0.json", "[0.2, ", "[", "are not four fractions"),
            ("bbox-v1.0.json", "{", "[", r"bbox-v1\.0\.json:1: not JSON \("),
            ("bbox-v1.0.json", "[0.2", "[" * 100_000, r"bbox-v1\.0\.json: not JSON \(maximum recursion"),
            ("bbox-v1.0.json", '{"', '{"\\ud800', "half a surrogate pair in a text"),
        ],
    )
    def test_faults(self, tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
        path = layouts.openasl(tmp_path) / "data" / file
        path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            segments_of(OpenAsl(tmp_path))

    def test_more_faults(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no data/openasl-v1\.0\.tsv below it"):
            OpenAsl(tmp_path)
        with pytest.raises(DataError, match="no text column 'en'\n  fix: use raw-text or tokenized-text"):
            OpenAsl(layouts.openasl(tmp_path), text="en")
        layouts.plain_json(tmp_path / "data/bbox-v1.0.json", [1])
        with pytest.raises(DataError, match="a list, not boxes by vid"):
            segments_of(OpenAsl(tmp_path))
        layouts.plain_json(tmp_path / "data/bbox-v1.0.json", {})
        path = tmp_path / "data/openasl-v1.0.tsv"
        path.write_text(path.read_text(encoding="utf-8").replace("\t00:00:00.480\t", "\t00:00:00.000\t"))
        assert segments_of(OpenAsl(tmp_path))[0].excluded == "no_duration"
