"""Small inputs for the shard tests: videos, corpora, a tokenizer. Not a test."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from shards.schema import Segment, VideoFile

WORDS = ["the", "a", "rain", "wind", "comes", "north", "morgen", "abend", "regen", "sonne", "und", "der", "stark"]


def pictures(frames: int, width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """uint8 [T, H, W, 3]: a bright bar whose position tells the frame number, over a smooth background."""
    images = np.zeros((frames, height, width, 3), np.uint8)
    images[..., 2] = np.linspace(20, 120, width, dtype=np.uint8)
    images[..., 0] = 30 + 20 * (seed % 5)
    for number in range(frames):
        left = (number * 4 + seed) % (width - 8)
        images[number, :, left : left + 8] = (240, 240, 40)
    return images


def bar_position(image: np.ndarray) -> int:
    """Left column of the bright bar of :func:`pictures`."""
    return round(float(np.flatnonzero(image[..., 1].astype(int).mean(0) > 120).mean()) - 3.5)


def mp4(
    frames: np.ndarray, fps: int = 25, audio: bool = False, times: Sequence[int] | None = None, **options: Any
) -> bytes:
    """An H.264 mp4 of uint8 [T, H, W, 3]; ``times`` are presentation times in milliseconds."""
    buffer = io.BytesIO()
    pix_fmt = options.pop("pix_fmt", "yuv420p")
    # cpu-independent: without it x264 gives other bytes now and then, and the tests that flip bytes would be a lottery
    settings = {"crf": "12", "g": "12", "bf": "0", "x264-params": "threads=1:cpu-independent=1"} | {
        key: str(value) for key, value in options.items()
    }
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=settings)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return buffer.getvalue()


def audio_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    return buffer.getvalue()


@dataclass
class ListCorpus:
    """A corpus from a list of segments."""

    items: list[Segment]
    name: str = "list"
    settings: dict[str, Any] = field(default_factory=dict)

    def segments(self) -> Iterator[Segment]:
        yield from self.items


def video_corpus(folder: Path, number: int, frames: int = 10, split: str = "train") -> ListCorpus:
    """``number`` videos written to ``folder`` (not in stored form: their GOP is longer)."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for index in range(number):
        path = folder / f"clip.{index}.mp4"
        path.write_bytes(mp4(pictures(frames + index % 3, seed=index), g=250, sc_threshold=0))
        text = f"satz nummer {index}"
        items.append(
            Segment("list", f"clip.{index}", split, text, VideoFile(path), "de", "gsg", "s1", "SATZ", f"list:{index}")
        )
    return ListCorpus(items)


def stored_corpus(videos: Path) -> ListCorpus:
    """A corpus of the videos in a folder: the same in every process."""
    paths = sorted(videos.glob("*.mp4"))
    return ListCorpus([Segment("list", path.name, "train", f"satz {path.stem}", VideoFile(path)) for path in paths])


def die_at_three(number: int) -> int:
    """Work for a process pool that kills its own process."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_at_once(segments: list[Segment]) -> list[Any]:
    """Work for a builder process that kills it."""
    os.kill(os.getpid(), signal.SIGKILL)
    return list(segments)


def text_corpus(documents: int, split: str = "train") -> ListCorpus:
    rng = np.random.default_rng(3)
    items = [
        Segment("docs", f"d:{index}", split, " ".join(rng.choice(WORDS, rng.integers(1, 30))), origin=f"docs:{index}")
        for index in range(documents)
    ]
    return ListCorpus(items, "docs")


def save_tokenizer(folder: Path, bos: str | None = "<s>") -> str:
    """A word-level tokenizer with the words of :data:`WORDS`, written as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", "<s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(folder)
    return str(folder)
