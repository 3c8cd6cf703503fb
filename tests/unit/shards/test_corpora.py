"""Corpora: the registry, PHOENIX's layout, annotation tables and text documents, with every fault they meet."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shards.build import BuildOptions, build
from shards.corpora import REGISTRY, convert, corpus_class, make_corpus
from shards.corpora.phoenix14t import Phoenix14T
from shards.corpora.rows import read_jsonl, read_lines, read_table
from shards.corpora.table import Table, seconds
from shards.corpora.text import Text
from shards.errors import DataError
from shards.lint import lint
from shards.schema import FrameFolder, Segment, VideoFile
from tests.unit.shards.making import pictures

HEADER = "name|video|start|end|speaker|orth|translation"


def phoenix(root: Path, rows: str = "", split: str = "train", header: str = HEADER) -> Path:
    base = root / "PHOENIX-2014-T"
    annotations = base / "annotations" / "manual"
    annotations.mkdir(parents=True, exist_ok=True)
    rows = rows or 'a-1|a-1/1/*.png|-1|-1|Signer01|REGEN "MORGEN|morgen "regen\nb-2|b-2/1/*.png|-1|-1|Signer02|X|y\n'
    (annotations / f"PHOENIX-2014-T.{split}.corpus.csv").write_text(f"{header}\n{rows}", encoding="utf-8")
    return base


def frames(folder: Path, number: int = 4) -> None:
    folder.mkdir(parents=True)
    for index, image in enumerate(pictures(number), 1):
        Image.fromarray(image).save(folder / f"images{index:04d}.png")
    (folder / "createDnnTrainingLabels-profile.py.lprof").write_bytes(b"x")


def only(corpus: Any) -> list[Segment]:
    return list(corpus.segments())


class TestRegistry:
    def test_every_entry_has_its_name(self) -> None:
        for name in REGISTRY:
            assert name == corpus_class(name).NAME  # type: ignore[attr-defined]

    def test_unknown_corpus_and_options(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"unknown corpus 'phoenix'\n  fix: did you mean phoenix14t\? known: "):
            corpus_class("phoenix")
        with pytest.raises(DataError, match=r"corpus table: unknown option 'medias'\n  fix: did you mean media\?"):
            make_corpus("table", {"table": "x.tsv", "medias": "m"})
        with pytest.raises(DataError, match="corpus phoenix14t: missing option root\n  fix: add --root VALUE"):
            make_corpus("phoenix14t", {})

    @pytest.mark.parametrize(
        ("value", "hint", "expected"),
        [
            ("3", int, 3),
            ("0.5", float, 0.5),
            ("true", bool | None, True),
            ("a,b", list[str], ["a", "b"]),
            ('["a,b"]', list[str] | None, ["a,b"]),
            ("train=a,dev=b", dict[str, Any], {"train": "a", "dev": "b"}),
            ('{"train": ["a"]}', dict[str, Any], {"train": ["a"]}),
            ("x/y", Path | None, Path("x/y")),
            ("x", str, "x"),
            (7, int, 7),
        ],
    )
    def test_conversion(self, value: Any, hint: Any, expected: Any) -> None:
        assert convert(value, hint, "here") == expected

    @pytest.mark.parametrize(("value", "hint"), [("x", int), ("x", float), ("maybe", bool), ("x", dict), ("[1", list)])
    def test_wrong_values(self, value: str, hint: Any) -> None:
        with pytest.raises(DataError, match=r"here: .* is not (int|float|bool|dict|list)"):
            convert(value, hint, "here")


class TestPhoenix:
    def test_segments(self, tmp_path: Path) -> None:
        base = phoenix(tmp_path)
        frames(base / "features/fullFrame-210x260px/train/a-1")
        frames(base / "features/fullFrame-210x260px/train/b-2/1")
        for root in (tmp_path, base):
            first, second = only(Phoenix14T(root))
            assert (first.id, first.split, first.text, first.gloss) == (
                "a-1",
                "train",
                'morgen "regen',
                'REGEN "MORGEN',
            )
            assert (first.language, first.sign_language, first.signer) == ("de", "gsg", "Signer01")
            assert isinstance(first.media, FrameFolder) and first.media.path.name == "a-1" and first.media.fps == 25.0
            assert isinstance(second.media, FrameFolder) and second.media.path.name == "1"
            assert first.origin.endswith("PHOENIX-2014-T.train.corpus.csv:2")
        manifest = build(Phoenix14T(tmp_path), tmp_path / "set", BuildOptions())
        assert manifest.splits == {"train": 2} and lint(tmp_path / "set").frames == 8

    def test_annotations_alone_can_be_counted(self, tmp_path: Path) -> None:
        phoenix(tmp_path)
        phoenix(tmp_path, split="dev")
        corpus = Phoenix14T(tmp_path)
        assert corpus.splits == ["train", "dev"] and len(only(corpus)) == 4
        assert len(only(Phoenix14T(tmp_path, splits=["dev"]))) == 2
        with pytest.raises(DataError, match=r"segments cannot be used \(\{'missing_media': 2\}\)"):
            build(Phoenix14T(tmp_path, splits=["dev"]), tmp_path / "set", BuildOptions())

    def test_byte_order_mark_and_crlf_are_read(self, tmp_path: Path) -> None:
        base = phoenix(tmp_path)
        path = base / "annotations/manual/PHOENIX-2014-T.train.corpus.csv"
        plain = only(Phoenix14T(tmp_path))
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
        assert only(Phoenix14T(tmp_path)) == plain

    @pytest.mark.parametrize(
        ("rows", "header", "message"),
        [
            ("", HEADER.replace("|", ","), r"csv:1: the delimiter '\|' does not occur in the header"),
            ("", HEADER.replace("orth", "glosses"), r"csv:1: no column 'orth'; the header is \['name'"),
            ("a|a/1/*.png|-1\n", HEADER, r"csv:2: 3 fields, the header has 7\n  fix: repair the row"),
            ("a|../../etc/*|1|1|s|o|t\n", HEADER, r"csv:2: the video column '\.\./\.\./etc/\*' is not NAME/1/\*\.png"),
        ],
    )
    def test_broken_annotations(self, tmp_path: Path, rows: str, header: str, message: str) -> None:
        phoenix(tmp_path, rows, header=header)
        with pytest.raises(DataError, match=message):
            only(Phoenix14T(tmp_path))

    def test_wrong_root_and_split(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no annotations/manual/PHOENIX-2014-T\.train\.corpus\.csv below it"):
            Phoenix14T(tmp_path)
        phoenix(tmp_path)
        with pytest.raises(DataError, match=r"unknown split \['eval'\]"):
            Phoenix14T(tmp_path, splits=["eval"])
        with pytest.raises(DataError, match=r"test\.corpus\.csv: cannot be read \(No such file"):
            only(Phoenix14T(tmp_path, splits=["test"]))


class TestReading:
    def test_other_encodings_name_line_and_byte(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tsv"
        path.write_bytes("id\ttext\n1\tschön\n".encode("latin-1"))
        with pytest.raises(
            DataError, match=r"a\.tsv:2: not UTF-8: byte 0xf6 at column 6\n  fix: convert the file, e\.g\. iconv"
        ):
            list(read_lines(path))
        path.write_bytes("id\ttext\n".encode("utf-16"))
        with pytest.raises(DataError, match=r"a\.tsv:1: not UTF-8"):
            list(read_lines(path))

    def test_quotes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text('id,text\n1,"a, ""b""\nnext"\n2,c\n')
        assert [row["text"] for _, row in read_table(path, ",", True, ["id"])] == ['a, "b"\nnext', "c"]
        path.write_text('id,text\n1,"a\n2,c\n')
        with pytest.raises(DataError, match=r"broken quoting .*\n  fix: quoting=false if quotes are plain text"):
            list(read_table(path, ",", True, ["id"]))
        path.write_text('id,text\n1,say "a\n')
        assert [row["text"] for _, row in read_table(path, ",", False, ["id"])] == ['say "a']

    def test_json_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"id": 1, "text": "x"}\n\n{"id": 2}\n')
        with pytest.raises(DataError, match=r"a\.jsonl:3: lacks text; found \['id'\]"):
            list(read_jsonl(path, ["id", "text"]))
        path.write_text("[1]\n")
        with pytest.raises(DataError, match=r"a\.jsonl:1: lacks everything; found list"):
            list(read_jsonl(path, ["id"]))
        path.write_text("{no}\n")
        with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON .*\n  fix: one object per line"):
            list(read_jsonl(path, ["id"]))


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
        path.write_text(content.replace("val", "extra"))
        with pytest.raises(DataError, match=r"a\.csv:2: split 'extra'\n  fix: use one of train, dev, test"):
            only(corpus)

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

    def test_a_row_without_media_is_missing_media(self, tmp_path: Path) -> None:
        path = self.table(tmp_path, content="id\tmedia\ttext\n1\t\tx\n")
        with pytest.raises(DataError, match="'missing_media': 1"):
            build(Table(table=path), tmp_path / "set", BuildOptions())

    @pytest.mark.parametrize(
        ("cell", "expected"),
        [("", None), ("12.5", 12.5), ("01:02", 62.0), ("1:00:00.250", 3600.25), ("00:00:01,5", 1.5), ("7.", 7.0)],
    )
    def test_times(self, cell: str, expected: float | None) -> None:
        assert seconds(cell, "here") == expected

    @pytest.mark.parametrize("cell", ["x", "-1", "1:2:3:4", "1e3"])
    def test_times_that_are_none(self, cell: str) -> None:
        with pytest.raises(DataError, match=r"here: .* is not a time\n  fix: use seconds or HH:MM:SS\.mmm"):
            seconds(cell, "here")

    def test_wrong_options(self, tmp_path: Path) -> None:
        path = self.table(tmp_path)
        with pytest.raises(
            DataError, match=r"a\.tsv:1: no column 'txt'; the header is .*\n  fix: did you mean 'text'\?"
        ):
            only(Table(table=path, text="txt"))
        with pytest.raises(DataError, match=r"split='part' is neither a column of .* nor train, dev or test"):
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


class TestText:
    def test_one_document_per_line(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("erster satz\n\n zweiter satz \r\n", encoding="utf-8")
        (tmp_path / "b.txt").write_text("dritter\n")
        corpus = make_corpus("text", {"paths": f"train={tmp_path}/a.txt,dev={tmp_path}/b.txt", "language": "de"})
        found = [(s.split, s.id, s.text, s.media, s.language) for s in only(corpus)]
        assert found == [
            ("train", "train/a.txt:1#0.0", "erster satz", None, "de"),
            ("train", "train/a.txt:3#0.0", "zweiter satz", None, "de"),
            ("dev", "dev/b.txt:1#0.0", "dritter", None, "de"),
        ]

    def test_templates_with_annotated_glosses(self, tmp_path: Path) -> None:
        (tmp_path / "a.tsv").write_text("eng\tsigns\nit rains\tRAIN\nno gloss\t\n")
        (tmp_path / "b.jsonl").write_text('{"eng": "sun", "signs": ["SUN", "COME"]}\n')
        corpus = Text(
            paths={"train": [str(tmp_path / "a.tsv"), str(tmp_path / "b.jsonl")]}, text="eng", gloss="signs",
            templates=["{text}", "signs: {gloss} sentence: {text}"],
        )  # fmt: skip
        texts = [segment.text for segment in only(corpus)]
        assert texts == [
            "it rains", "signs: RAIN sentence: it rains", "no gloss", "", "sun", "signs: SUN COME sentence: sun",
        ]  # fmt: skip
        assert corpus.settings["gloss"] == "annotated"

    def test_pseudo_glosses_repeat_by_document(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("der regen kommt aus dem norden\ndie sonne scheint\n")
        (tmp_path / "words").write_text("der\ndie\naus\ndem\n")
        options: dict[str, Any] = {
            "paths": {"train": str(path)}, "templates": ["{gloss}", "{text}"], "repeat_max": 3, "passes": 4,
        }  # fmt: skip
        corpus = Text(**options, function_words=[str(tmp_path / "words")])
        segments = only(corpus)
        assert len(segments) == 2 * (4 + 1) and len({segment.id for segment in segments}) == 10
        first = [segment.text for segment in segments[:4]]
        assert len(set(first)) > 1, "passes must differ"
        assert all(list(dict.fromkeys(text.split())) == ["regen", "kommt", "norden"] for text in first)
        assert only(Text(**options, function_words=["der", "die", "aus", "dem"])) == segments
        path.write_text("die sonne scheint\nder regen kommt aus dem norden\n")
        assert [segment.text for segment in only(corpus)[5:9]] == first, "repetition must depend on the document alone"
        assert corpus.settings == {
            "templates": ["{gloss}", "{text}"], "repeat_max": 3, "passes": 4, "seed": 0, "gloss": "pseudo",
            "lowercase_gloss": False,
        }  # fmt: skip
        (tmp_path / "b.tsv").write_text("text\tsigns\nMorgen\tREGEN Viel\n")
        lower = Text(paths={"train": f"{tmp_path}/b.tsv"}, gloss="signs", templates=["{gloss}"], lowercase_gloss=True)
        assert only(lower)[0].text == "regen viel"

    def test_wrong_options(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("x\n")
        paths = {"train": str(path)}
        with pytest.raises(DataError, match="neither a gloss field nor function_words"):
            Text(paths=paths, templates=["{gloss}"])
        with pytest.raises(DataError, match="templates, repeat_max and passes must be >= 1"):
            Text(paths=paths, passes=0)
        with pytest.raises(DataError, match=r"a\.pdf: unknown file type\n  fix: use \.txt"):
            Text(paths={"train": "a.pdf"})
        with pytest.raises(DataError, match=r"a\.txt has no field 'signs'"):
            Text(paths=paths, gloss="signs")
        with pytest.raises(DataError, match="split 'a b'"):
            Text(paths={"a b": str(path)})
        with pytest.raises(DataError, match=r"two train files named a\.txt"):
            Text(paths={"train": [str(path), str(tmp_path / "x" / "a.txt")]})
