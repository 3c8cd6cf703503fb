"""The synthetic sign corpus: one right translation, distinct signs, honest splits, the same bytes every time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from shards.corpora import make_corpus
from shards.corpora import synthetic as synthetic_module
from shards.corpora.synthetic import Synthetic, SyntheticOptions, generate
from shards.corpora.synthetic_grammar import (
    FUNCTION_WORDS,
    LEXICON,
    LOCATIONS,
    MINIMAL_PAIRS,
    OBJECTS,
    POINT,
    VOCABULARY,
    sample,
    translate,
)
from shards.corpora.synthetic_render import SIGNERS, UNSEEN_SIGNER, Signer, render, sentence_poses
from shards.errors import DataError
from shards.schema import VideoFile

OPTIONS = SyntheticOptions(seed=3, train=14, dev=2, test=2, test_signer=2, text_train=300, text_dev=20)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "corpus"
    generate(folder, OPTIONS, workers=1)
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- grammar


@pytest.mark.parametrize(
    ("glosses", "text"),
    [
        (
            "YESTERDAY MARKET TEACHER OLD CAR RED BUY NOT",
            "yesterday the old teacher did not buy a red car at the market",
        ),
        ("TOMORROW GARDEN CAT SMALL BALL BLUE FIND", "tomorrow the small cat will find the blue ball in the garden"),
        ("TODAY MOTHER APPLE BUY", "today my mother is buying an apple"),
        ("TODAY CHILD MANY DANCE NOT", "today many children are not dancing"),
        ("CHILD MANY UMBRELLA OLD SELL", "many children sell an old umbrella"),
        ("WOMAN HAPPY KNIFE MANY LOSE", "the happy woman loses many knives"),
        ("DOG MANY LETTER BRING NOT", "many dogs do not bring a letter"),
        ("YESTERDAY FRIEND FLOWER DRAW", "yesterday my friend drew the flower"),
        ("SCHOOL NEIGHBOUR WAIT NOT", "our neighbour does not wait at school"),
    ],
)
def test_a_sign_sequence_has_one_translation(glosses: str, text: str) -> None:
    assert translate(glosses.split()) == text


def test_sampled_sentences() -> None:
    rng = random.Random(0)
    sentences = [sample(rng) for _ in range(4000)]
    lengths = [len(glosses) for _, glosses in sentences]
    assert min(lengths) == 3 and max(lengths) <= 8
    assert 4.3 < np.mean(lengths) < 4.8
    assert all(translate(glosses) == text for text, glosses in sentences)
    assert len({text for text, _ in sentences}) == len({glosses for _, glosses in sentences}) > 3000
    counts = {gloss: sum(gloss in glosses for _, glosses in sentences) for gloss in VOCABULARY}
    assert min(counts.values()) > 80, min(counts, key=lambda gloss: counts[gloss])
    words = {word for text, _ in sentences for word in text.split()}
    assert words >= FUNCTION_WORDS
    assert not FUNCTION_WORDS & {gloss.lower() for gloss in VOCABULARY}


@pytest.mark.parametrize("glosses", ["", "CAR BUY", "DOG BUY", "DOG CAR WAIT", "DOG YESTERDAY DANCE", "DOG RED DANCE"])
def test_translate_refuses_what_is_no_sentence(glosses: str) -> None:
    with pytest.raises(DataError, match="is not a sentence of the synthetic sign language") as error:
        translate(glosses.split())
    assert "keep the order TIME PLACE SUBJECT" in str(error.value)


# --- signs


def test_signs_are_pairwise_distinct() -> None:
    assert set(LEXICON) == {*VOCABULARY, POINT} and 40 <= len(VOCABULARY) <= 48
    close = []
    for (name, sign), (other_name, other) in itertools.combinations(LEXICON.items(), 2):
        assert sign.differences(other) >= 1, (name, other_name)
        if sign.differences(other) == 1:
            close.append({name, other_name})
    assert close == [{"DOG", "CAT"}, {"RED", "BLUE"}, {"BUY", "SELL"}]
    assert set().union(*close) == set(MINIMAL_PAIRS)


def test_locations_are_apart() -> None:
    for one, other in itertools.combinations(LOCATIONS.values(), 2):
        assert np.hypot(one[0] - other[0], one[1] - other[1]) > 0.15


@pytest.mark.parametrize("signer", [*SIGNERS, UNSEEN_SIGNER], ids=lambda signer: signer.name)
def test_hands_stay_in_the_picture_and_can_be_seen(signer: Signer) -> None:
    poses, _ = sentence_poses(VOCABULARY, signer, 12.5, random.Random(1))
    assert max(abs(hand[0]) for pose in poses for hand in (pose.right, pose.left)) * signer.scale < 0.45
    assert min(hand[1] for pose in poses for hand in (pose.right, pose.left)) > 0.1
    colours = np.array([[signer.skin, signer.clothes, signer.background]], np.uint8)
    skin, *behind = np.asarray(Image.fromarray(colours).convert("YCbCr"))[0].astype(int)
    assert min(np.abs(skin - other).sum() for other in behind) > 45


def test_rendered_sentence() -> None:
    glosses = ("YESTERDAY", "DOG", "BALL", "FIND", "NOT")
    signed = render(glosses, SIGNERS[0], 64, 12.5, random.Random(0))
    frames, count, starts = signed.frames(), len(signed.poses), signed.starts
    pictures = np.stack(list(frames))
    assert pictures.shape == (count, 64, 64, 3) and pictures.dtype == np.uint8
    assert len(starts) == len(glosses) and starts[0] >= 1 and starts[-1] + 4 <= count
    gaps = np.diff(starts)
    assert gaps.min() >= 5 and gaps.max() <= 12
    again = render(glosses, SIGNERS[0], 64, 12.5, random.Random(0)).frames()
    assert np.array_equal(pictures, np.stack(list(again)))


# --- corpus


def test_two_workers_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    generate(tmp_path / "two", OPTIONS, workers=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20, 20) and len(seen) == 2
    assert bytes_of(tmp_path / "two") == bytes_of(root)


def test_videos_can_be_stored_as_they_are(root: Path) -> None:
    for row in rows_of(root / "segments.jsonl"):
        with av.open(str(root / row["video"])) as container:
            assert not container.streams.audio
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert stream.average_rate == Fraction(25, 2) and (stream.width, stream.height) == (64, 64)
            frames = list(container.decode(stream))
        assert len(frames) == row["frames"]
        assert [frame.time for frame in frames] == [pytest.approx(number / 12.5) for number in range(len(frames))]
        keys = [number for number, frame in enumerate(frames) if frame.key_frame]
        assert keys[0] == 0 and np.diff([*keys, len(frames)]).max() <= 12
        assert len(row["boundaries"]) == len(row["gloss"].split())


def test_splits_share_no_sentence() -> None:
    options = SyntheticOptions(train=3000, dev=200, test=200, test_signer=200, text_train=5000, text_dev=200)
    videos, texts = synthetic_module._draw_sentences(options)
    by_split: dict[str, list[str]] = {f"text/{name}": [s.text for s in rows] for name, rows in texts.items()}
    for video in videos:
        by_split.setdefault(video.split, []).append(video.sentence.text)
    for split in ("dev", "test", "test_signer", "text/dev", "text/train"):
        assert len(set(by_split[split])) == len(by_split[split]), f"{split} repeats a sentence"
    for held_out in ("dev", "test", "test_signer", "text/dev"):
        for other in by_split.keys() - {held_out}:
            assert not set(by_split[held_out]) & set(by_split[other]), (held_out, other)
    signed = [gloss for video in videos if video.split == "train" for gloss in video.sentence.glosses]
    assert min(signed.count(gloss) for gloss in VOCABULARY) > 60
    objects = {gloss: signed.count(gloss) for gloss in OBJECTS}
    assert max(objects.values()) < 3 * min(objects.values())


def test_segments(root: Path) -> None:
    segments = list(make_corpus("synthetic", {"root": str(root)}).segments())
    assert [segment.split for segment in segments] == ["train"] * 14 + ["dev"] * 2 + ["test"] * 2 + ["test_signer"] * 2
    assert len({segment.id for segment in segments}) == len(segments)
    for segment in segments:
        assert isinstance(segment.media, VideoFile) and segment.media.path.is_file()
        assert (segment.corpus, segment.language, segment.sign_language) == ("synthetic", "en", "xsl")
        assert translate(segment.gloss.split()) == segment.text
        assert (segment.signer == UNSEEN_SIGNER.name) == (segment.split == "test_signer")
    assert {segment.signer for segment in segments if segment.split == "train"} == {signer.name for signer in SIGNERS}
    assert segments[2].origin == "segments.jsonl:3"


def test_text_files(root: Path) -> None:
    train, dev = rows_of(root / "text/train.jsonl"), rows_of(root / "text/dev.jsonl")
    assert (len(train), len(dev)) == (300, 20)
    assert all(translate(row["gloss"].split()) == row["text"] for row in train + dev)
    held_out = {row["text"] for row in rows_of(root / "segments.jsonl") if row["split"] != "train"}
    assert not held_out & {row["text"] for row in train + dev}


def test_a_finished_corpus_is_left_alone(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    generate(root, OPTIONS, workers=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_interrupted_corpus_is_made_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, encode = tmp_path / "corpus", synthetic_module.encode
    calls = itertools.count()

    def interrupted(frames: Iterable[np.ndarray], size: int, fps: float, crf: int) -> bytes:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return encode(frames, size, fps, crf)

    monkeypatch.setattr(synthetic_module, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(folder, OPTIONS, workers=1)
    assert len(list((folder / "videos").iterdir())) == 5
    (folder / "videos" / "stale-000000.mp4").write_bytes(b"from another run")
    with pytest.raises(DataError, match=r"no finished synthetic corpus here \(options.json is missing\)"):
        list(Synthetic(folder).segments())
    monkeypatch.undo()
    generate(folder, OPTIONS, workers=1)
    assert bytes_of(folder) == bytes_of(root)


# --- refusals


def test_other_options_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match="seed is 3 there and 4 here, train is 14 there and 15 here") as error:
        generate(root, dataclasses.replace(OPTIONS, seed=4, train=15), workers=1)
    assert str(root / "options.json") in str(error.value) and "use another folder" in str(error.value)


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "mine.mp4").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"not empty \(it holds 'videos'\).*\n.*a folder of its own"):
        generate(tmp_path, OPTIONS, workers=1)
    assert (tmp_path / "videos" / "mine.mp4").read_bytes() == b"mine"


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written.*\n.*free space or use another folder"):
        generate(tmp_path / "file" / "corpus", OPTIONS, workers=1)


def test_workers_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"workers is 0.*\n.*at least one"):
        generate(tmp_path, OPTIONS, workers=0)


def test_impossible_options_are_named_together() -> None:
    with pytest.raises(DataError) as error:
        SyntheticOptions(train=-1, size=33, fps=2.0, crf=0, text_train=10**6)
    for part in ("SyntheticOptions", "train is -1", "size is 33", "fps is 2.0", "crf is 0", "1000850 distinct", "fix:"):
        assert part in str(error.value)


@pytest.mark.parametrize("content", ["{not json", "[1]"])
def test_damaged_options(tmp_path: Path, content: str) -> None:
    (tmp_path / "options.json").write_text(content)
    with pytest.raises(DataError, match=r"options.json: not a JSON object.*\n.*generate it again"):
        generate(tmp_path, OPTIONS, workers=1)


def test_damaged_segments(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text("{}")
    with pytest.raises(DataError, match=r"segments.jsonl: cannot be read: No such file.*\n.*generate it again"):
        list(Synthetic(tmp_path).segments())
    (tmp_path / "segments.jsonl").write_text('{"id": "train-000000"}\n')
    with pytest.raises(DataError, match=r"segments.jsonl:1: not a row of a synthetic corpus.*'split'"):
        list(Synthetic(tmp_path).segments())
