"""Tiny copies of corpora in their true layout, with the oddities of the real files. Not a test."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

from PIL import Image

from shards.build.build import BuildOptions, build
from shards.format.index import read_index
from shards.inspect.lint import lint
from shards.schema import Corpus, IndexRow, Segment
from tests.unit.shards.making import mp4, pictures


def segments_of(corpus: Corpus) -> list[Segment]:
    return list(corpus.segments())


def built(corpus: Any, folder: Path, allowed: float = 0.6) -> dict[str, IndexRow]:
    """Rows of a set built from the corpus by their id; the set passes lint."""
    build(corpus, folder / "set", BuildOptions(max_skipped_fraction=allowed))
    assert lint(folder / "set").ok
    return {row.sample_id: row for row in read_index(folder / "set").rows()}


def video(path: Path, frames: int = 25, fps: int = 25) -> Path:
    """An H.264 file of 64 x 48 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mp4(pictures(frames), fps=fps))
    return path


def images(folder: Path, suffix: str = "png", frames: int = 4) -> None:
    folder.mkdir(parents=True)
    for index, image in enumerate(pictures(frames), 1):
        Image.fromarray(image).save(folder / f"images{index:04d}.{suffix}")


def text(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pickled(path: Path, value: Any, packed: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = pickle.dumps(value)
    path.write_bytes(gzip.compress(payload) if packed else payload)
    return path


def plain_json(path: Path, value: Any) -> Path:
    """A plain JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


PHOENIX_FRAMES = "PHOENIX-2014-T/features/fullFrame-210x260px"


def gfslt(root: Path, split: str = "train") -> Path:
    """GFSLT-VLP's labels of two clips, one with frames."""
    entries = {}
    for name, words in (("a-1", "regen im norden"), ("b-2", "am tag sonne")):
        key = f"{split}/{name}"
        entries[key] = {
            "name": key,
            "gloss": words.upper(),
            "text": words,
            "length": 4,
            "imgs_path": [f"{key}/images0001.png"],
        }
    images(root / PHOENIX_FRAMES / split / "a-1")
    return pickled(root / "labels" / f"labels.{split}", entries)


def csl(root: Path, clips: bool = False, pickle_too: bool = True) -> Path:
    """Two good entries, the listed one that nobody annotated, and the annotated one that no split lists."""
    names = ["S000000_P0000_T00", "S000001_P0009_T01", "S000007_P0003_T00"]
    words = [["他", "是", "谁", "？"], ["我", "很", "好", "。"], ["他", "是", "谁", "？"]]
    info = [
        {
            "name": name,
            "length": 4,
            "label_gloss": ["他", "谁"],
            "label_char": list("".join(sentence)),
            "label_word": sentence,
            "label_postag": ["r", "v", "v", "w"],
            "signer": 3,
            "time": 0,
        }
        for name, sentence in zip(names, words, strict=True)
    ]
    labels = root / "sentence_label"
    if pickle_too:
        pickled(labels / "csl2020ct_v2.pkl", {"info": info, "gloss_map": ["他"], "word_map": ["他"]}, packed=False)
    lines = [
        f"{number}|{name}|4|他 谁|{' '.join(''.join(sentence))}|{' '.join(sentence)}|r v v w"
        for number, (name, sentence) in enumerate(zip(names, words, strict=True))
    ]
    text(labels / "video_map.txt", ["index|name|length|gloss|char|word|postag", *lines])
    text(labels / "split_1.txt", ["name|split", f"{names[0]}|train", "S000005_P0004_T00|train", f"{names[1]}|test"])
    for name in names[:2]:
        if clips:
            video(root / "sentence-crop" / f"{name}.mp4", frames=15, fps=30)
        else:
            images(root / "sentence" / "frames_512x512" / name, "jpg")
    return root


HOW2SIGN_HEADER = "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE"


def how2sign(root: Path, split: str = "train", realigned: bool = True) -> Path:
    """Three sentences of two videos: an id that begins with a dash, quotes, and the same SENTENCE_ID twice."""
    rows = [
        "-fZc293MpJk\t-fZc293MpJk-1-rgb_front\t-fZc293MpJk_0\t-fZc293MpJk_0-1-rgb_front\t0.0\t0.48\tHi!",
        "G42xKICVj9U\tG42xKICVj9U-10-rgb_front\tG42xKICVj9U_0\tG42xKICVj9U_0-10-rgb_front\t0.2\t1.0\t"
        '"You can\'t decide, ""You know what?"',
        'G42xKICVj9U\tG42xKICVj9U-5-rgb_front\tG42xKICVj9U_0\tG42xKICVj9U_0-5-rgb_front\t0.0\t0.4\tA "plain" one',
    ]
    header = HOW2SIGN_HEADER if realigned else HOW2SIGN_HEADER.replace("_REALIGNED", "")
    text(root / f"how2sign_{'realigned_' if realigned else ''}{split}.csv", [header, *rows])
    for name in ("-fZc293MpJk-1", "G42xKICVj9U-10", "G42xKICVj9U-5"):
        video(root / "raw_videos" / f"{name}-rgb_front.mp4")
    return root


OPENASL_HEADER = "vid\tyid\tstart\tend\traw-text\ttokenized-text\tgloss\tsplit"


def openasl(root: Path) -> Path:
    """Four segments of two videos; the last has no box, its video is gone, too."""
    spans = [
        ("abcdefghij1", "00:00:00.000", "00:00:00.480", 'He said "hi', "train"),
        ("abcdefghij1", "00:00:00.480", "00:00:01.000", "Second.", "valid"),
        ("abcdefghij2", "00:00:01.000", "00:00:02.000", "Gone.", "test"),
        ("abcdefghij2", "00:00:02.000", "00:00:03.000", "No box.", "test"),
    ]
    rows = [
        f"{yid}-{start}-{end}\t{yid}\t{start}\t{end}\t{words}\t{words.lower()}\tGLOSS\t{split}"
        for yid, start, end, words, split in spans
    ]
    text(root / "data" / "openasl-v1.0.tsv", [OPENASL_HEADER, *rows])
    boxes = {row.split("\t")[0]: [0.2, 0.0, 0.7, 1.2] for row in rows[:3]}
    plain_json(root / "data" / "bbox-v1.0.json", boxes)
    video(root / "raw-video" / "abcdefghij1.mp4")
    return root


def wlasl(root: Path) -> Path:
    """Two glosses: a clip, a cut of a YouTube video, one to its end, and one that is gone."""
    instance = {
        "bbox": [385, 37, 885, 720],
        "fps": 25,
        "frame_end": -1,
        "frame_start": 1,
        "instance_id": 0,
        "signer_id": 118,
        "source": "aslbrick",
        "split": "train",
        "url": "http://aslbricks.org/book.mp4",
        "variation_id": 0,
        "video_id": "69241",
    }
    youtube = {"url": "https://www.youtube.com/watch?v=abcdefghij1", "source": "asllex"}
    glosses = [
        {"gloss": "book", "instances": [instance, instance | youtube | {"video_id": "07069", "frame_end": 10}]},
        {
            "gloss": "thin person",
            "instances": [
                instance | youtube | {"video_id": "00333", "frame_start": 11, "split": "val", "signer_id": -1},
                instance | {"video_id": "00334", "split": "test"},
            ],
        },
    ]
    plain_json(root / "WLASL_v0.3.json", glosses)
    for name in ("69241", "07069", "00333"):
        video(root / "videos" / f"{name}.mp4", frames=10)
    for name in ("69241", "abcdefghij1"):
        video(root / "raw_videos_mp4" / f"{name}.mp4")
    return root


def msasl(root: Path) -> Path:
    """Two signs of one video, one of them without a box's area, and one video that is gone."""
    sign = {
        "org_text": "match [light-a-MATCH]",
        "clean_text": "match",
        "text": "match",
        "start_time": 0.0,
        "end_time": 0.4,
        "start": 0,
        "end": 10,
        "signer_id": 0,
        "signer": 0,
        "file": "match light-a-MATCH",
        "label": 830,
        "height": 360.0,
        "width": 640.0,
        "fps": 25.0,
        "box": [0.047, 0.290, 1.0, 0.823],
        "url": "https://www.youtube.com/watch?v=abcdefghij1",
    }
    flat = sign | {"start_time": 0.4, "end_time": 0.8, "box": [0.5, 0.2, 0.5, 0.8], "label": 3}
    plain_json(root / "MSASL_train.json", [sign, flat, sign | {"end_time": 0.0}])
    plain_json(root / "MSASL_val.json", [sign | {"url": "youtu.be/abcdefghij9", "text": "fish", "clean_text": ""}])
    video(root / "videos" / "abcdefghij1.mp4")
    return root
