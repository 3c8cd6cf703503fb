"""The synthetic sign corpus: no download, generated in about half a minute, small enough to learn on two CPU cores.

``generate`` writes a folder::

    videos/<id>.mp4      H.264 that the shard builder takes over as it is
    poses/<id>.npy       with the option ``poses``: keypoints of every frame, float32 [frames, 30, 3], layout synthetic
    segments.jsonl       id, split, text, gloss, signer, frames, video, boundaries (first frame of each sign)
    text/train.jsonl     {"text", "gloss"}: sentences for language modelling, without any held-out sentence
    text/dev.jsonl       a held-out set of its own
    options.json         appears last: a folder with options.json.unfinished instead is generated again

Splits: ``train``; ``dev`` and ``test`` (unseen sentences, seen signers); ``test_signer`` (unseen sentences and an
unseen signer). A held-out sentence occurs in no other split and in no text file. ``Synthetic`` reads such a folder.

With ``german`` every row of the three files has ``text_de``. With ``dialogue`` above 1 the videos are conversations:
`slt shards previous --pattern '(?P<video>[a-z_]+-\d+)-(?P<start>\d)'` finds the sentences before.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from shards.corpora import synthetic_grammar as grammar
from shards.corpora.synthetic_german import translate as in_german
from shards.corpora.synthetic_joints import keypoints
from shards.corpora.synthetic_render import RENDER_VERSION, SIGNERS, UNSEEN_SIGNER, encode, render
from shards.errors import DataError
from shards.schema import Segment, VideoFile

NAME = "synthetic"
LANGUAGE, GERMAN, SIGN_LANGUAGE = "en", "de", "xsl"

OPTIONS_FILE, SEGMENTS_FILE = "options.json", "segments.jsonl"
VIDEO_FOLDER, TEXT_FOLDER, POSE_FOLDER = "videos", "text", "poses"
UNFINISHED_FILE = "options.json.unfinished"
"""Written first and renamed to OPTIONS_FILE at the end."""
MAX_DISTINCT_SENTENCES = 100_000
"""Most distinct sentences of one corpus; the grammar has about a million, but drawing rare ones takes long."""
SAMPLES_PER_TASK = 16

Progress = Callable[[int, int], None]
"""Called with the videos done and the videos in total."""


@dataclass(frozen=True, slots=True)
class SyntheticOptions:
    """The options that decide every byte of a corpus. Raises DataError for values that cannot work."""

    seed: int = 0
    train: int = 1500
    """Videos of the split; so are the next three."""
    dev: int = 100
    test: int = 150
    test_signer: int = 100
    text_train: int = 20_000
    """Distinct sentences of text/train.jsonl."""
    text_dev: int = 500
    size: int = 64
    """Frame width and height in pixels."""
    fps: float = 12.5
    crf: int = 18
    dialogue: int = 1
    """Sentences per conversation: those after the first are about its subject, by a sign that does not say who it is.
    Each is a video of its own; the ids of a conversation differ in their last number."""
    german: bool = False
    """Give every signed sentence in German, too: a second segment of the same video, its id ending in ``-de``."""
    poses: bool = False
    """Write the keypoints of every frame, too."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, but must not be negative"
            for name in ("train", "dev", "test", "test_signer", "text_train", "text_dev")
            if getattr(self, name) < 0
        ]
        if not 1 <= self.dialogue <= 8:
            problems.append(f"dialogue is {self.dialogue}, but must lie between 1 and 8 sentences")
        if self.size < 32 or self.size % 2:
            problems.append(f"size is {self.size}, but must be even and at least 32 pixels")
        if not 8 <= self.fps <= 60:
            problems.append(f"fps is {self.fps}, but must lie between 8 and 60")
        if not 0 < self.crf <= 51:
            problems.append(f"crf is {self.crf}, but must lie between 1 and 51")
        distinct = self.dev + self.test + self.test_signer + self.text_dev + self.text_train
        if distinct > MAX_DISTINCT_SENTENCES:
            problems.append(f"{distinct} distinct sentences are asked for, at most {MAX_DISTINCT_SENTENCES} are made")
        if problems:
            raise DataError("; ".join(problems), where="SyntheticOptions", fix="change these options")

    def to_dict(self) -> dict[str, object]:
        options = {"render_version": RENDER_VERSION, **dataclasses.asdict(self)}
        newer = {"poses": False, "dialogue": 1, "german": False}  # older corpora lack them
        return {name: value for name, value in options.items() if name not in newer or value != newer[name]}


@dataclass(frozen=True, slots=True)
class _Sentence:
    text: str
    glosses: tuple[str, ...]
    referent: grammar.Referent | None = None

    def row(self, german: bool) -> dict[str, str]:
        texts = {"text": self.text, "gloss": " ".join(self.glosses)}
        return {**texts, "text_de": in_german(self.glosses, self.referent)} if german else texts


@dataclass(frozen=True, slots=True)
class _Video:
    """Everything a worker needs to make one video."""

    id: str
    split: str
    sentence: _Sentence
    signer: int
    """Index into SIGNERS; -1 is the unseen signer."""


def generate(root: Path, options: SyntheticOptions, workers: int, on_progress: Progress | None = None) -> None:
    """Generate the corpus in `root`. The same options give the same bytes for any number of worker processes.

    A finished corpus with the same options is kept, an unfinished one is generated again.

    Raises:
        DataError: `root` holds a corpus made with other options or other files, `workers` is below 1,
            or a file cannot be written.
    """
    if workers < 1:
        raise DataError(f"workers is {workers}", where="generate", fix="use at least one worker process")
    try:
        if _is_finished(root, options):
            return
        _start(root, options)
        videos, texts = _draw_sentences(options)
        for name, sentences in texts.items():
            _write_rows(root / TEXT_FOLDER / f"{name}.jsonl", [sentence.row(options.german) for sentence in sentences])
        _write_rows(root / SEGMENTS_FILE, _make_videos(root, options, videos, workers, on_progress))
        os.replace(root / UNFINISHED_FILE, root / OPTIONS_FILE)
    except OSError as error:
        raise DataError(
            f"the synthetic corpus cannot be written: {error}", where=str(root), fix="free space or use another folder"
        ) from error


def _is_finished(root: Path, options: SyntheticOptions) -> bool:
    if not (root / OPTIONS_FILE).exists():
        return False
    existing_options, new_options = _read_options(root), options.to_dict()
    if existing_options == new_options:
        return True
    keys = sorted(
        key for key in existing_options.keys() | new_options.keys() if existing_options.get(key) != new_options.get(key)
    )
    raise DataError(
        "the folder holds a corpus made with other options: "
        + ", ".join(f"{key} is {existing_options.get(key)} there and {new_options.get(key)} here" for key in keys),
        where=str(root / OPTIONS_FILE),
        fix="use another folder, or delete this one to make it again",
    )


def _read_options(root: Path) -> dict[str, object]:
    try:
        options = json.loads((root / OPTIONS_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        options = error
    if not isinstance(options, dict):
        raise DataError(
            f"not a JSON object: {options}",
            where=str(root / OPTIONS_FILE),
            fix="delete the folder and generate it again",
        )
    return options


def _start(root: Path, options: SyntheticOptions) -> None:
    """Mark the folder as unfinished and remove the rest of an interrupted run; refuse a folder with other content."""
    root.mkdir(parents=True, exist_ok=True)
    entries = sorted(path.name for path in root.iterdir())
    if entries and UNFINISHED_FILE not in entries:
        raise DataError(
            f"the folder is not empty (it holds {entries[0]!r}) and is no unfinished synthetic corpus",
            where=str(root),
            fix="generate the synthetic corpus into a folder of its own",
        )
    (root / UNFINISHED_FILE).write_text(json.dumps(options.to_dict(), indent=2) + "\n", encoding="utf-8")
    for leftover in (*root.glob(f"{VIDEO_FOLDER}/*.mp4"), *root.glob(f"{TEXT_FOLDER}/*.jsonl"), root / SEGMENTS_FILE):
        leftover.unlink(missing_ok=True)
    for folder in (VIDEO_FOLDER, TEXT_FOLDER, *([POSE_FOLDER] if options.poses else [])):
        (root / folder).mkdir(exist_ok=True)


def _draw_sentences(options: SyntheticOptions) -> tuple[list[_Video], dict[str, list[_Sentence]]]:
    """Every sentence of the corpus. Held-out ones come first, so that all later draws can leave them out."""
    held_out: set[str] = set()

    def distinct(name: str, count: int, taken: set[str], length: int) -> list[_Sentence]:
        rng = random.Random(f"{options.seed}/{name}")
        sentences: list[_Sentence] = []
        while len(sentences) < count:
            drawn = _conversation(rng, length)
            if taken.isdisjoint(sentence.text for sentence in drawn):
                taken.update(sentence.text for sentence in drawn)
                sentences += drawn
        return sentences[:count]

    long = options.dialogue
    splits = {name: distinct(name, getattr(options, name), held_out, long) for name in ("dev", "test", "test_signer")}
    texts = {"dev": distinct("text/dev", options.text_dev, held_out, 1)}
    texts["train"] = distinct("text/train", options.text_train, set(held_out), 1)
    rng = random.Random(f"{options.seed}/train")
    train: list[_Sentence] = []
    while len(train) < options.train:  # a sentence may be signed more than once, as in real corpora
        drawn = _conversation(rng, long)
        if held_out.isdisjoint(sentence.text for sentence in drawn):
            train += drawn
    videos = [
        _Video(_id(split, number, long), split, sentence, _signer(split, number // long))
        for split, sentences in {"train": train[: options.train], **splits}.items()
        for number, sentence in enumerate(sentences)
    ]
    return videos, texts


def _conversation(rng: random.Random, length: int) -> list[_Sentence]:
    """A sentence, and others about its subject."""
    text, glosses = grammar.sample(rng)
    return [_Sentence(text, glosses), *(_Sentence(*grammar.follow(rng, glosses)) for _ in range(length - 1))]


def _id(split: str, number: int, long: int) -> str:
    return f"{split}-{number:06d}" if long == 1 else f"{split}-{number // long:06d}-{number % long}"


def _signer(split: str, number: int) -> int:
    return -1 if split == "test_signer" else number % len(SIGNERS)


def _make_videos(
    root: Path, options: SyntheticOptions, videos: Sequence[_Video], workers: int, on_progress: Progress | None
) -> list[dict[str, object]]:
    """Render and write all videos; returns their rows of segments.jsonl in order."""
    tasks = [
        (root, options, videos[start : start + SAMPLES_PER_TASK]) for start in range(0, len(videos), SAMPLES_PER_TASK)
    ]
    rows: list[dict[str, object]] = []

    def collect(results: Iterator[list[dict[str, object]]]) -> None:
        for result in results:
            rows.extend(result)
            if on_progress:
                on_progress(len(rows), len(videos))

    if workers == 1:
        collect(map(_make_some, tasks))
    else:
        # spawn: the caller may already run threads (torch, decoders), which a forked child would inherit half-way
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, max(1, len(tasks))), mp_context=context) as pool:
            collect(pool.map(_make_some, tasks))
    return rows


def _make_some(task: tuple[Path, SyntheticOptions, Sequence[_Video]]) -> list[dict[str, object]]:
    root, options, videos = task
    rows = []
    for video in videos:
        signer = UNSEEN_SIGNER if video.signer < 0 else SIGNERS[video.signer]
        rng = random.Random(f"{options.seed}/{video.id}")
        signed = render(video.sentence.glosses, signer, options.size, options.fps, rng)
        file = f"{VIDEO_FOLDER}/{video.id}.mp4"
        (root / file).write_bytes(encode(signed.frames(), options.size, options.fps, options.crf))
        if options.poses:
            np.save(root / POSE_FOLDER / f"{video.id}.npy", keypoints(signed))
        facts = {"signer": signer.name, "frames": len(signed.poses), "video": file, "boundaries": signed.starts}
        rows.append({"id": video.id, "split": video.split, **video.sentence.row(options.german), **facts})
    return rows


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


class Synthetic:
    """A finished folder made by `generate`, as a corpus.

    Args:
        root: the folder; `slt demo` leaves one in its output folder, under ``corpus``.
    """

    NAME: ClassVar[str] = NAME
    name: str = NAME

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def segments(self) -> Iterator[Segment]:
        """Every signed sentence, in the order train, dev, test, test_signer. Raises DataError for unusable folders."""
        if not (self.root / OPTIONS_FILE).exists():
            raise DataError(
                f"no finished synthetic corpus here ({OPTIONS_FILE} is missing)",
                where=str(self.root),
                fix="make it with shards.corpora.synthetic.generate, or run `slt demo`",
            )
        path = self.root / SEGMENTS_FILE
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror}", where=str(path), fix="delete the folder and generate it again"
            ) from error
        for number, line in enumerate(lines, start=1):
            yield from self._segments(line, f"{SEGMENTS_FILE}:{number}")

    def _segments(self, line: str, origin: str) -> Iterator[Segment]:
        """A signed sentence in each of its languages."""
        try:
            row = json.loads(line)
            english = Segment(
                corpus=NAME,
                id=row["id"],
                split=row["split"],
                text=row["text"],
                media=VideoFile(self.root / row["video"]),
                language=LANGUAGE,
                sign_language=SIGN_LANGUAGE,
                signer=row["signer"],
                gloss=row["gloss"],
                origin=origin,
            )
            german = str(row.get("text_de", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"not a row of a synthetic corpus: {error!r}",
                where=f"{self.root}/{origin}",
                fix="delete the folder and generate it again",
            ) from error
        yield english
        if german:
            yield dataclasses.replace(english, id=f"{english.id}-{GERMAN}", text=german, language=GERMAN)
