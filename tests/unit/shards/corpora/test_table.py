"""Annotation tables: options that name columns, file types, splits, crops, times, and corpora read this way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.build.build import BuildOptions, build
from shards.corpora import make_corpus
from shards.corpora.table import Table, seconds
from shards.errors import DataError
from shards.format.index import read_index
from shards.schema import Crop, FrameFolder, Segment, VideoFile
from tests.unit.shards.making import mp4, pictures


def only(corpus: Any) -> list[Segment]:
    return list(corpus.segments())


class TestTable:
    def table(self, folder: Path, name: str = "a.tsv", content: str = 'id\tmedia\ttext\n1\tv.mp4\tein "Satz\n') -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    def test_defaults(self, tmp_path: Path) -> None:
        (segment,) = only(Table(table=self.table(tmp_path), language="sk", sign_language="svk", corpus="spj"))
        assert segment == Segment(
            "spj",
            "1",
            "train",
            'ein "Satz',
            VideoFile(tmp_path / "v.mp4"),
            "sk",
            "svk",
            origin=f"{tmp_path / 'a.tsv'}:2",
        )

    def test_how2sign_columns(self, tmp_path: Path) -> None:
        header = "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE"
        row = '-x\t-x-5-rgb_front\t-x_0\t-x_0-5-rgb_front\t1.25\t3.5\tHe said, "go".'
        path = self.table(tmp_path, "how2sign_realigned_train.csv", f"{header}\n{row}\n")
        options = {
            "table": str(path), "delimiter": "tab", "id": "SENTENCE_NAME", "media": "VIDEO_NAME",
            "media_suffix": ".mp4", "start": "START_REALIGNED", "end": "END_REALIGNED", "text": "SENTENCE",
            "split": "train", "media_root": str(tmp_path / "videos"), "language": "en", "sign_language": "ase",
        }  # fmt: skip
        (segment,) = only(make_corpus("table", options))
        assert segment.media == VideoFile(tmp_path / "videos" / "-x-5-rgb_front.mp4", 1.25, 3.5)
        assert (segment.id, segment.text) == ("-x_0-5-rgb_front", 'He said, "go".')
        with pytest.raises(DataError, match=r"the delimiter ',' does not occur .*\n  fix: it looks separated by '\\t'"):
            only(make_corpus("table", {**options, "delimiter": ""}))

    def test_columns_for_split_language_signer(self, tmp_path: Path) -> None:
        content = "id,media,text,part,lang,who,signs\n1,a,x,val,de,s1,A B\n2,b,y,Test,en,s2,C\n"
        path = self.table(tmp_path, "a.csv", content)
        corpus = Table(table=path, split="part", language="lang", signer="who", gloss="signs")
        found = [(s.split, s.language, s.signer, s.gloss) for s in only(corpus)]
        assert found == [("dev", "de", "s1", "A B"), ("test", "en", "s2", "C")]
        path.write_text(content.replace("val", "Test_Unseen"))
        assert [segment.split for segment in only(corpus)] == ["test_unseen", "test"]
        path.write_text(content.replace("val", "no split"))
        with pytest.raises(
            DataError, match=r"a\.csv:2: split 'no split'\n  fix: use train, dev, test or another plain"
        ):
            only(corpus)
        assert {segment.split for segment in only(Table(table=path, split="test_seen"))} == {"test_seen"}

    def test_json_lines_and_folders_of_frames(self, tmp_path: Path) -> None:
        path = self.table(tmp_path, "a.jsonl", json.dumps({"id": 7, "media": "f", "text": None}) + "\n")
        (segment,) = only(Table(table=path, frames_fps=30.0, frames_pattern="*.jpg"))
        assert segment.media == FrameFolder(tmp_path / "f", "*.jpg", 30.0)
        assert (segment.id, segment.text) == ("7", "")

    def test_hashed_fractions(self, tmp_path: Path) -> None:
        rows = "".join(f"s{number}\tv.mp4\tx\n" for number in range(2000))
        path = self.table(tmp_path, content="id\tmedia\ttext\n" + rows)
        corpus = Table(table=path, dev_fraction=0.1, test_fraction=0.2)
        splits = {segment.id: segment.split for segment in only(corpus)}
        shares = [list(splits.values()).count(name) / 2000 for name in ("train", "dev", "test")]
        assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
        path.write_text("id\tmedia\ttext\n" + "".join(reversed(rows.splitlines(keepends=True)[:500])))
        assert all(splits[segment.id] == segment.split for segment in only(corpus)), "a row's split depends on others"
        other = Table(table=path, dev_fraction=0.1, test_fraction=0.2, split_seed=1)
        assert any(splits[segment.id] != segment.split for segment in only(other))

    def test_ids_from_media_and_times(self, tmp_path: Path) -> None:
        path = self.table(tmp_path, content="media\tfrom\tto\ttext\nv.mp4\t1\t00:00:02.5\tx\n\t\t\ty\n")
        corpus = Table(table=path, id="", start="from", end="to")
        with pytest.raises(DataError, match=r"a\.tsv:3: the identifier is empty"):
            only(corpus)
        path.write_text("media\tfrom\tto\ttext\nv.mp4\t1\t00:00:02.5\tx\n")
        (segment,) = only(corpus)
        assert segment.id == "v.mp4@1@00:00:02.5" and segment.media == VideoFile(tmp_path / "v.mp4", 1.0, 2.5)

    def test_media_that_cannot_be_a_file_name(self, tmp_path: Path) -> None:
        path = self.table(tmp_path, content=f"id\tmedia\ttext\n1\tclips/{'x' * 256}\tx\n")
        with pytest.raises(DataError, match=r"a\.tsv:2: media 'clips/x+'\.\.\. cannot name a file"):
            only(Table(table=path))

    def test_a_row_without_media_is_missing_media(self, tmp_path: Path) -> None:
        path = self.table(tmp_path, content="id\tmedia\ttext\n1\t\tx\n")
        with pytest.raises(DataError, match="missing_media 1"):
            build(Table(table=path), tmp_path / "set", BuildOptions())

    @pytest.mark.parametrize(
        ("cell", "expected"),
        [("", None), ("12.5", 12.5), ("01:02", 62.0), ("1:00:00.250", 3600.25), ("00:00:01,5", 1.5), ("7.", 7.0)],
    )
    def test_times(self, cell: str, expected: float | None) -> None:
        assert seconds(cell, "here") == expected

    @pytest.mark.parametrize("cell", ["x", "--1", "-", "1:2:3:4", "1e3", "9" * 5000, "1\n", "¹"])
    def test_times_that_are_none(self, cell: str) -> None:
        with pytest.raises(DataError, match=r"here: .* is not a time\n  fix: use seconds or HH:MM:SS\.mmm"):
            seconds(cell, "here")

    @pytest.mark.parametrize("cell", ["00:75:10", "00:10:75", "5:60"])
    def test_clocks_that_do_not_exist(self, cell: str) -> None:
        with pytest.raises(DataError, match=f"here: '{cell}' has 60 minutes or seconds or more\n  fix: use HH:MM:SS"):
            seconds(cell, "here")
        assert seconds("90:30", "here") == 5430.0

    def test_negative_times(self, tmp_path: Path) -> None:
        for cell in ("-1", "-0:02.5"):
            with pytest.raises(DataError, match=f"here: the time {cell} is negative\n  fix: times count from"):
                seconds(cell, "here")
        path = self.table(tmp_path, content="id\tmedia\ttext\ts\te\n1\ta.mp4\tx\t3\t1\n2\tb.mp4\tx\t2\t2\n")
        with pytest.raises(DataError) as caught:
            build(Table(table=path, start="s", end="e"), tmp_path / "set", BuildOptions())
        assert "wrong_times the end 1 s lies before the start 3 s" in str(caught.value)
        assert "wrong_times start and end are both 2 s" in str(caught.value)
        assert "fix: correct the times in the annotations; or raise --max-skipped-fraction" in str(caught.value)

    def test_media_outside_the_folder(self, tmp_path: Path) -> None:
        path = self.table(tmp_path, content="id\tmedia\ttext\n1\t/data/a.mp4\tx\n2\tb/../../c.mp4\tx\n")
        rows = Table(table=path).segments()
        assert next(rows).media.path == Path("/data/a.mp4"), "an absolute path is the user's own choice"  # type: ignore[union-attr]
        with pytest.raises(
            DataError, match=r"a\.tsv:3: media 'b/\.\./\.\./c\.mp4' leaves its folder\n  fix: add --media-root"
        ):
            next(rows)

    def test_suffixes_in_capitals(self, tmp_path: Path) -> None:
        path = self.table(tmp_path)
        assert len(only(Table(table=path.rename(tmp_path / "A.TSV")))) == len(only(Table(table=self.table(tmp_path))))

    def test_wrong_options(self, tmp_path: Path) -> None:
        path = self.table(tmp_path)
        with pytest.raises(
            DataError, match=r"a\.tsv:1: no column 'txt'; the header is .*\n  fix: did you mean 'text'\?"
        ):
            only(Table(table=path, text="txt"))
        with pytest.raises(DataError, match=r"split='part' is neither a column of .* nor train, dev, test or a name"):
            Table(table=path, split="part")
        with pytest.raises(DataError, match="language='German' is neither a column"):
            Table(table=path, language="German")
        with pytest.raises(DataError, match=r"dev_fraction 0\.6 \+ test_fraction 0\.6 is not within 0\.\.1"):
            Table(table=path, dev_fraction=0.6, test_fraction=0.6)
        with pytest.raises(DataError, match="delimiter '::' is not one character"):
            Table(table=path, delimiter="::")
        with pytest.raises(DataError, match=r"cannot tell the delimiter of a \.dat file"):
            Table(table=self.table(tmp_path, "a.dat"))
        with pytest.raises(DataError, match=r"gone\.tsv: cannot be read"):
            Table(table=tmp_path / "gone.tsv")

    def test_openasl_columns(self, tmp_path: Path) -> None:
        header = "vid\tyid\tstart\tend\traw-text\ttokenized-text\tgloss\tsplit"
        row = '-x-00:00:01.000-00:00:02.500\t-x\t00:00:01.000\t00:00:02.500\tHe said "go"\the said go\t\tvalid'
        options = {
            "table": str(self.table(tmp_path, "openasl-v1.0.tsv", f"{header}\n{row}\n")), "id": "vid", "media": "yid",
            "media_suffix": ".mp4", "start": "start", "end": "end", "text": "raw-text", "split": "split",
            "language": "en", "sign_language": "ase",
        }  # fmt: skip
        (segment,) = only(make_corpus("table", options))
        assert segment.media == VideoFile(tmp_path / "-x.mp4", 1.0, 2.5)
        assert (segment.id, segment.split, segment.text) == (row.split("\t")[0], "dev", 'He said "go"')

    def test_slovak_columns(self, tmp_path: Path) -> None:
        content = "id\tvideo\tframes\ttranslation_sk\nspj_s000\tsentences/spj_s000.mp4\t95\tOn je nepočujúci.\n"
        options = {
            "table": str(self.table(tmp_path, "sentences.tsv", content)), "media": "video", "text": "translation_sk",
            "language": "sk", "sign_language": "svk", "corpus": "spj", "test_fraction": "0.2",
        }  # fmt: skip
        (segment,) = only(make_corpus("table", options))
        assert (segment.corpus, segment.text) == ("spj", "On je nepočujúci.")
        assert segment.media == VideoFile(tmp_path / "sentences/spj_s000.mp4")

    def test_crops(self, tmp_path: Path) -> None:
        content = "id\tmedia\ttext\tbox\n1\tv.mp4\tx\t0.25,0, 0.75,1\n2\tv.mp4\ty\t\n3\tv.mp4\tz\t[0, 0, 1.0, 5e-1]\n"
        path = self.table(tmp_path, content=content)
        first, second, third = [segment.media for segment in only(Table(table=path, bbox="box", bbox_square=True))]
        assert first == VideoFile(tmp_path / "v.mp4", crop=Crop(0.25, 0.0, 0.75, 1.0, True))
        assert second == VideoFile(tmp_path / "v.mp4")
        assert third == VideoFile(tmp_path / "v.mp4", crop=Crop(0.0, 0.0, 1.0, 0.5, True))
        (tmp_path / "v.mp4").write_bytes(mp4(pictures(5)))
        build(Table(table=path, bbox="box"), tmp_path / "set", BuildOptions())
        assert [(row.width, row.height) for row in read_index(tmp_path / "set").rows()] == [
            (32, 48),
            (64, 48),
            (64, 24),
        ]

    @pytest.mark.parametrize("box", ["10,20,110,220", "0.5,0,0.5,1", "0,0,1", "a,b,c,d", "-0.1,0,1,1", "0,0,1,nan"])
    def test_crops_that_are_none(self, tmp_path: Path, box: str) -> None:
        path = self.table(tmp_path, content=f"id\tmedia\ttext\tbox\n1\tv.mp4\tx\t{box}\n")
        with pytest.raises(
            DataError, match=r"a\.tsv:2: bbox '.*' is not left,top,right,bottom within 0\.\.1\n  fix: div"
        ):
            only(Table(table=path, bbox="box"))
        with pytest.raises(DataError, match="bbox works on video files, not on folders of frames"):
            Table(table=path, bbox="box", frames_fps=25.0)

    def test_json_arrays_and_parquet(self, tmp_path: Path) -> None:
        records = [
            {
                "id": 1,
                "media": "a.mp4",
                "text": "eins",
                "from": 0.25,
                "to": 1.0,
                "box": [0, 0.5, 1, 1],
                "signs": ["A", "B"],
            },
            {"id": 2, "media": "a.mp4", "text": None, "from": float("nan"), "to": None, "box": None, "signs": None},
        ]
        (tmp_path / "a.json").write_text(json.dumps(records))
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
        options = {"start": "from", "end": "to", "bbox": "box", "gloss": "signs"}
        for name in ("a.json", "a.parquet"):
            first, second = only(Table(table=tmp_path / name, **options))
            assert first.media == VideoFile(tmp_path / "a.mp4", 0.25, 1.0, Crop(0.0, 0.5, 1.0, 1.0))
            assert (first.id, first.gloss, second.id, second.text) == ("1", "A B", "2", "")
            assert second.media == VideoFile(tmp_path / "a.mp4")
            with pytest.raises(DataError, match=rf"a\.{name[2:]}.*: no field 'words'; found \['box', 'from'"):
                only(Table(table=tmp_path / name, text="words"))
        (segment, _) = only(Table(table=tmp_path / "a.json", id="", start="from", end="to"))
        assert segment.id == "a.mp4@0.25@1.0"
