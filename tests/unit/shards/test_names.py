"""Names in NFC and NFD are the same name, wherever annotations and files are brought together."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import lmdb
import pytest

from shards.build.build import BuildOptions, build
from shards.build.prepare import has_media
from shards.build.report import corpus_report
from shards.corpora import make_corpus
from shards.corpora.bobsl import Bobsl
from shards.corpora.csl_daily import CslDaily
from shards.corpora.dailymoth import DailyMoth
from shards.corpora.media_files import files_by_stem
from shards.corpora.rows import read_lines
from shards.corpora.table import Table
from shards.corpora.text import Text
from shards.errors import DataError
from shards.exchange.adopt import adopt
from shards.exchange.convert import ConvertOptions, convert
from shards.exchange.subset import assign_splits
from shards.format.index import read_index, write_index
from shards.format.verify import verify
from shards.inspect.lint import lint
from shards.inspect.preview_catalog import Catalog, Query
from shards.inspect.stats import describe
from shards.names import ByName, existing, same_name
from shards.schema import FrameFolder, Segment, VideoFile
from tests.unit.shards.corpora.layouts import csl, images, video
from tests.unit.shards.exchange.test_adopt import write_tar
from tests.unit.shards.making import ListCorpus, mp4, pictures
from tests.unit.shards.shard_sets import in_memory

NFC = unicodedata.normalize("NFC", "čerešňa")
NFD = unicodedata.normalize("NFD", NFC)
BOTH = pytest.mark.parametrize(("annotated", "stored"), [(NFC, NFD), (NFD, NFC)], ids=["nfc", "nfd"])


def test_a_mapping_by_names() -> None:
    found = ByName([(NFD, 1), ("plain", 2)])
    assert NFC in found and found[NFC] == 1 and found.get(NFC.upper()) is None and list(found) == [NFD, "plain"]
    found[NFC] = 3
    assert len(found) == 2 and found[NFD] == 3 and same_name("plain") == "plain"


@BOTH
def test_the_path_that_is_there(tmp_path: Path, annotated: str, stored: str) -> None:
    (tmp_path / stored / "in").mkdir(parents=True)
    file = tmp_path / stored / "in" / f"{stored}.mp4"
    file.touch()
    assert existing(tmp_path / annotated / "in" / f"{annotated}.mp4") == file
    assert existing(tmp_path / annotated / "other.mp4") == tmp_path / annotated / "other.mp4", "there is none"
    (exact := tmp_path / stored / "in" / f"{annotated}.mp4").touch()
    assert existing(tmp_path / stored / "in" / f"{annotated}.mp4") == exact, "the very name comes first"


def test_several_other_spellings(tmp_path: Path) -> None:
    for name in ("\u00ea\u0323", "\u1eb9\u0302"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="'\u1ec7' is there in 2 other spellings of the same characters"):
        existing(tmp_path / "\u1ec7")


@BOTH
def test_media_of_a_table(tmp_path: Path, annotated: str, stored: str) -> None:
    video(tmp_path / f"{stored}.mp4")
    (tmp_path / "t.tsv").write_text(f"id\tmedia\tčas\n{annotated}\t{annotated}.mp4\tregen\n", encoding="utf-8")
    column = unicodedata.normalize("NFD", "čas")
    corpus = Table(table=tmp_path / "t.tsv", text=column, split="train")
    assert corpus_report(corpus)["splits"]["train"]["missing_media"] == 0
    build(corpus, tmp_path / "set", BuildOptions())
    (row,) = read_index(tmp_path / "set").rows()
    assert (row.sample_id, row.text, row.frames) == (annotated, "regen", 25)
    assert lint(tmp_path / "set").ok
    (tmp_path / f"{stored}.mp4").rename(tmp_path / f"{annotated}.mp4")
    build(corpus, tmp_path / "set", BuildOptions())  # the same corpus on another disk: nothing to do


@BOTH
def test_folders_of_frames(tmp_path: Path, annotated: str, stored: str) -> None:
    images(tmp_path / stored)
    assert has_media(FrameFolder(tmp_path / annotated, "*.png", 25.0))
    items = [Segment("list", "a", "train", "regen", FrameFolder(tmp_path / annotated, "*.png", 25.0))]
    build(ListCorpus(items), tmp_path / "set", BuildOptions())
    assert read_index(tmp_path / "set").row(0).frames == 4


def test_one_id_in_two_spellings_is_given_twice(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4")
    media = VideoFile(tmp_path / "a.mp4")
    items = [Segment("list", name, "train", "regen", media, origin=f"t:{n}") for n, name in enumerate((NFC, NFD))]
    with pytest.raises(DataError, match=r"t:1: the id .* occurs twice, first at t:0"):
        build(ListCorpus(items), tmp_path / "set", BuildOptions())


def test_files_by_name(tmp_path: Path) -> None:
    (tmp_path / f"{NFD}.mp4").touch()
    assert files_by_stem(tmp_path, (".mp4",))[NFC].name == f"{NFD}.mp4"
    (tmp_path / f"{NFC}.mp4").touch()
    with pytest.raises(DataError, match="two files for"):
        files_by_stem(tmp_path, (".mp4",))


@BOTH
def test_joined_annotations(tmp_path: Path, annotated: str, stored: str) -> None:
    release = csl(tmp_path, pickle_too=False)
    for file, name in (("split_1.txt", annotated), ("video_map.txt", stored)):
        path = release / "sentence_label" / file
        path.write_text(path.read_text(encoding="utf-8").replace("S000000_P0000_T00", name), encoding="utf-8")
    found = {segment.id: (segment.text, segment.excluded) for segment in CslDaily(release).segments()}
    assert found[annotated] == ("他是谁？", "") and stored not in found


@BOTH
def test_episodes_and_subtitles(tmp_path: Path, annotated: str, stored: str) -> None:
    corpus = Bobsl(root=tmp_path, subtitles=Path("subtitles"), splits=["train"])
    (tmp_path / corpus.videos).mkdir(parents=True)
    (tmp_path / corpus.videos / f"{stored}.mp4").touch()
    (tmp_path / "subtitles").mkdir()
    (tmp_path / "subtitles" / f"{annotated}.vtt").write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nhello\n")
    (tmp_path / corpus.episodes).parent.mkdir(parents=True)
    lists = {"train": [annotated], "val": [], "test": []}
    (tmp_path / corpus.episodes).write_text(json.dumps(lists), encoding="utf-8")
    (segment,) = corpus.segments()
    assert (segment.text, segment.excluded) == ("hello", "")
    (tmp_path / corpus.episodes).write_text(json.dumps(lists | {"val": [stored]}), encoding="utf-8")
    with pytest.raises(DataError, match="is listed twice: in train and dev"):
        list(corpus.segments())


def test_clips_beside_their_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "val.tsv").write_text(f"{NFC}.mp4\t1.0\thello\n", encoding="utf-8")
    (folder := tmp_path / "unblurred_clips" / "videos").mkdir(parents=True)
    (folder / f"{NFD}.mp4").touch()
    (segment,) = DailyMoth(tmp_path).segments()
    assert isinstance(segment.media, VideoFile) and segment.media.path == folder / f"{NFD}.mp4"


@BOTH
def test_annotations_of_a_foreign_store(tmp_path: Path, annotated: str, stored: str) -> None:
    with lmdb.open(str(tmp_path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        transaction.put(stored.encode(), mp4(pictures(8)))
    table = tmp_path / "t.tsv"
    table.write_text(f"id\ttext\n{annotated}\tregen\n", encoding="utf-8")
    options = ConvertOptions(tmp_path, "lmdb", "mine", table=table, defaults={"split": "train"})
    convert(options, tmp_path / "set", BuildOptions())
    assert read_index(tmp_path / "set").row(0).text == "regen"


@pytest.mark.parametrize("verb", ["index", "convert"])
def test_members_of_a_tar(tmp_path: Path, verb: str) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "val-0.tar", [(f"{NFC}.mp4", mp4(pictures(8))), (f"{NFD}.json", b'{"text": "regen"}')])
    if verb == "index":
        adopt(tmp_path / "in", "mine")
        assert verify(tmp_path / "in") == []
    else:
        convert(ConvertOptions(tmp_path / "in", "wds", "mine"), tmp_path / "set", BuildOptions())
    (row,) = read_index(tmp_path / ("in" if verb == "index" else "set")).rows()
    assert (row.sample_id, row.text, row.frames) == (NFC, "regen", 8)


def test_paths_that_are_typed(tmp_path: Path) -> None:
    (tmp_path / NFD).mkdir()
    (tmp_path / NFD / f"{NFD}.txt").write_text("regen\n")
    for given in (f"{NFC}/{NFC}.txt", NFC, f"{NFC}/{NFC[:3]}*.txt"):
        (segment,) = Text(paths={"train": str(tmp_path / given)}).segments()
        assert segment.text == "regen"
    assert list(read_lines(tmp_path / NFC / f"{NFC}.txt")) == [(1, "regen")]
    (tmp_path / NFD / "t.json").write_text('[{"id": "1", "media": "a.mp4", "text": "regen"}]')
    (segment,) = make_corpus("table", {"table": str(tmp_path / NFC / "t.json"), "split": "train"}).segments()
    assert segment.text == "regen"


def test_signers_and_searches(tmp_path: Path) -> None:
    columns = {"signer": [NFC, NFD, "eva"], "split": ["train", "dev", "dev"], "text": [NFD, "sneh", "sneh"]}
    made = in_memory("video", [10, 20, 30], **columns)
    assert describe(made, "set")["signers"]["dev"]["not_in_train"] == ["eva"]
    names = assign_splits(made.table, {"train": 0.5, "dev": 0.5}, ["signer"], 0)
    assert names[0] == names[1] != names[2]
    write_index(tmp_path, made.table, made.manifest)
    assert [row["number"] for row in Catalog(tmp_path).page(Query(search=NFC[:4]), 1, 9)["rows"]] == [0, 1]
