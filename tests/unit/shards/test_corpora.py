"""Corpora: the registry, PHOENIX's layout, annotation tables and text documents, with every fault they meet."""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shards.build.build import BuildOptions, build
from shards.corpora import REGISTRY, convert, corpus_class, make_corpus, option_meanings
from shards.corpora.phoenix14t import Phoenix14T
from shards.corpora.rows import read_jsonl, read_lines, read_table
from shards.corpora.text import Text
from shards.errors import DataError, OptionError
from shards.inspect.lint import lint
from shards.schema import FrameFolder, Segment
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

    @pytest.mark.parametrize(
        ("value", "hint", "message"),
        [
            ("x", int, "'x' is not a whole number\n  fix: write a whole number, for example 3"),
            ("x", float, "'x' is not a number\n  fix: write a number, for example 0.5"),
            ("maybe", bool | None, "'maybe' is not true or false\n  fix: write true or false"),
            ("news/", dict[str, str], "'news/' is not key=value\n  fix: write key=value,key=value"),
            (
                "train=a,b",
                dict[str, Any],
                '\'b\' is not key=value\n  fix: write key=value,key=value, or as JSON {"key": ["value", "value"]}',
            ),
            ("{1", dict[str, Any], "'{1' is not a JSON object\n  fix: write key=value,"),
            ("[1", list[str], "'[1' is not a JSON list\n  fix: write value,value, or as JSON"),
            ("train=a,train=b", dict[str, str], "train is given twice: 'a' and 'b'\n  fix: write key=value"),
            ('{"t": "a", "t": "b"}', dict[str, Any], "t is given twice: 'a' and 'b'\n  fix: write key=value"),
        ],
    )
    def test_wrong_values(self, value: str, hint: Any, message: str) -> None:
        with pytest.raises(OptionError) as caught:
            convert(value, hint, "here")
        assert str(caught.value).startswith(f"here: {message}") and caught.value.exit_code == 2
        assert type(pickle.loads(pickle.dumps(caught.value))) is OptionError

    def test_every_corpus_says_what_its_options_are_for(self) -> None:
        assert option_meanings(corpus_class("phoenix14t"))["labels"].startswith(
            "folder with a derivative's label files"
        )
        assert option_meanings(corpus_class("hf_dataset"))["passes"].startswith("Variants per document")
        for name in REGISTRY:
            assert option_meanings(corpus_class(name)), name


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
        with pytest.raises(DataError, match=r"segments cannot be used \(missing_media 2\)"):
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
        with pytest.raises(
            DataError, match=r"a\.tsv:1: UTF-16 .*, not UTF-8: byte 0xff at column 1\n  fix: .* iconv -f UTF-16"
        ):
            list(read_lines(path))

    def test_quotes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text('id,text\n1,"a, ""b""\nnext"\n2,c\n')
        assert [row["text"] for _, row in read_table(path, ",", True, ["id"])] == ['a, "b"\nnext', "c"]
        path.write_text('id,text\n1,"a\n2,c\n')
        message = r"a\.csv:2: broken quoting \(unexpected end of data\) in the row that begins here, which was read to"
        with pytest.raises(DataError, match=message + r" line 3\n  fix: close the quote, or add --quoting false"):
            list(read_table(path, ",", True, ["id"]))
        path.write_text('id,text\n1,"a\n2,"b",c\n')
        with pytest.raises(DataError, match=r"a\.csv:2: broken quoting .*which was read to line 3"):
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
