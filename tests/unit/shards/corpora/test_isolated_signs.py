"""WLASL and MS-ASL: layouts, frame numbers and boxes, faults, and a build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shards.corpora import make_corpus
from shards.corpora.msasl import MsAsl
from shards.corpora.wlasl import Wlasl
from shards.errors import DataError
from shards.schema import Crop, VideoFile
from tests.unit.shards.corpora import layouts
from tests.unit.shards.corpora.layouts import built, segments_of


class TestIsolatedSigns:
    def test_wlasl_clips(self, tmp_path: Path) -> None:
        corpus = make_corpus("wlasl", {"root": str(layouts.wlasl(tmp_path))})
        segments = segments_of(corpus)
        assert [(s.id, s.split, s.text, s.signer) for s in segments] == [
            ("69241", "train", "book", "118"),
            ("07069", "train", "book", "118"),
            ("00333", "dev", "thin person", ""),
            ("00334", "test", "thin person", "118"),
        ]
        assert segments[0].origin.endswith("WLASL_v0.3.json:record 1 instance 0")
        assert {name: row.frames for name, row in built(corpus, tmp_path).items()} == dict.fromkeys(
            ("69241", "07069", "00333"), 10
        )

    def test_wlasl_whole_videos(self, tmp_path: Path) -> None:
        corpus = Wlasl(layouts.wlasl(tmp_path), clips=False)
        assert [segment.media for segment in segments_of(corpus)] == [
            VideoFile(tmp_path / "raw_videos_mp4/69241.mp4"),
            VideoFile(tmp_path / "raw_videos_mp4/abcdefghij1.mp4", None, 0.4),
            VideoFile(tmp_path / "raw_videos_mp4/abcdefghij1.mp4", 0.4, None),
            VideoFile(tmp_path / "raw_videos_mp4/00334.mp4"),
        ]
        assert {name: row.frames for name, row in built(corpus, tmp_path).items()} == {
            "69241": 25,
            "07069": 10,
            "00333": 15,
        }

    def test_wlasl_labels_of_derivatives(self, tmp_path: Path) -> None:
        entry = {"name": "00335", "gloss": ["book"], "text": "book", "video_path": "train/00335.mp4"}
        layouts.pickled(tmp_path / "labels-2000.train", {"00335": entry, "7": entry | {"name": "7", "text": ""}})
        layouts.pickled(tmp_path / "labels-100.val", [entry])
        path = layouts.video(tmp_path / "videos/train/00335.mp4", frames=5)
        corpus = make_corpus("wlasl", {"root": str(tmp_path), "labels": str(tmp_path)})
        first, second = segments_of(corpus)
        assert (first.id, first.text, first.gloss, first.split) == ("00335", "book", "book", "train")
        assert first.media == VideoFile(path) and (second.text, second.gloss) == ("book", "book")
        assert segments_of(Wlasl(tmp_path, labels=tmp_path, glosses=100))[0].split == "dev"
        with pytest.raises(DataError, match="label files name clips, not whole videos"):
            Wlasl(tmp_path, labels=tmp_path, clips=False)

    def test_wlasl_without_its_json(self, tmp_path: Path) -> None:
        (tmp_path / "WLASL_v0.1.json").write_text("[]")
        said = r"no WLASL_v0\.3\.json in it; there is WLASL_v0\.1\.json\n  fix: pass the folder start_kit"
        with pytest.raises(DataError, match=said):
            Wlasl(tmp_path)

    def test_wlasl_subsets(self, tmp_path: Path) -> None:
        corpus = Wlasl(layouts.wlasl(tmp_path), glosses=1, splits=["train"])
        assert len(segments_of(corpus)) == 2 and corpus.published == {} and sum(Wlasl.WHOLE.values()) == 21083
        with pytest.raises(DataError, match="corpus wlasl: glosses=0"):
            Wlasl(tmp_path, glosses=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"split": "x"}, r"WLASL_v0\.3\.json:record 1 instance 0: split 'x'"),
            ({"frame_start": "1"}, "frame_start is '1', not a number"),
            ({"signer_id": True}, "signer_id is True, not a number"),
            ({"video_id": 3}, "instance 0: 3 cannot name a file"),
            (None, "instance 0: the instance lacks video_id, split"),
        ],
    )
    def test_wlasl_faults(self, tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
        path = layouts.wlasl(tmp_path) / "WLASL_v0.3.json"
        content = json.loads(path.read_text())
        content[0]["instances"][0] = content[0]["instances"][0] | change if change else "x"
        layouts.plain_json(path, content)
        with pytest.raises(DataError, match=message):
            segments_of(Wlasl(tmp_path, clips=False))
        layouts.plain_json(path, [{"gloss": "a", "instances": {}}])
        with pytest.raises(DataError, match="record 1: instances is no list"):
            segments_of(Wlasl(tmp_path))

    def test_msasl(self, tmp_path: Path) -> None:
        corpus = make_corpus("msasl", {"root": str(layouts.msasl(tmp_path))})
        match, flat, nothing, fish = segments_of(corpus)
        assert (match.id, match.text, match.signer, match.split) == ("train/00001/abcdefghij1", "match", "0", "train")
        assert match.media == VideoFile(
            tmp_path / "videos/abcdefghij1.mp4", 0.0, 0.4, Crop(0.290, 0.047, 0.823, 1.0, square=True)
        )
        assert (flat.excluded, nothing.excluded) == ("no_box", "no_duration")
        assert (fish.text, fish.split) == ("fish", "dev")
        rows = built(corpus, tmp_path)
        assert [(row.frames, row.width == row.height) for row in rows.values()] == [(10, True)]

    def test_msasl_options_and_faults(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no MSASL_train\.json in it"):
            MsAsl(tmp_path)
        few = MsAsl(layouts.msasl(tmp_path), classes=100, boxes=False, splits=["train"])
        (segment,) = segments_of(few)
        assert segment.media.crop is None and segment.excluded == "" and not few.published  # type: ignore[union-attr]
        path = tmp_path / "MSASL_train.json"
        entry = json.loads(path.read_text())[0]
        for change, message in (
            ({"url": "http://x.org/a.mp4"}, "record 1: no YouTube id in 'http"),
            ({"box": [0.1, 0.2, 0.3]}, r"record 1 box: \[0\.1, 0\.2, 0\.3\] are not four fractions"),
            ({"start_time": None}, "start_time is None, not a number"),
        ):
            layouts.plain_json(path, [entry | change])
            with pytest.raises(DataError, match=message):
                segments_of(MsAsl(tmp_path))
