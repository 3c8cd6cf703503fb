"""The demo's data: a generated sign corpus, a tokenizer, and both packed into shards."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from pipeline.demo.settings import PAIR_TEMPLATE, PLAIN_TEMPLATE, VOCABULARY, DemoSize
from pipeline.demo.tokenizer import train_tokenizer
from shards.build.build import BuildOptions, build
from shards.cli.progress import progress
from shards.corpora.synthetic import Synthetic, SyntheticOptions, generate
from shards.corpora.synthetic_grammar import FUNCTION_WORDS
from shards.corpora.text import Text
from shards.media.video import VideoOptions
from shards.schema import Corpus

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DemoData:
    """Folders the stages read."""

    video: Path
    text: Path
    text_plain: Path
    """Text without sign-order pairs (ablation)."""
    tokenizer: Path
    recipes: str = "demo"
    """First part of the recipes' names."""


def prepare(out: Path, size: DemoSize, seed: int, workers: int, gloss_free: bool = False) -> DemoData:
    """Generate, tokenise and pack; skips every step whose result exists.

    ``gloss_free``: the pairs of stage 1 come from the sentences alone (function words dropped, spoken order), not
    from the corpus' glosses.
    """
    corpus, shards = out / "corpus", out / "shards"
    options = SyntheticOptions(
        seed=seed, train=size.train, dev=size.dev, test=size.test, test_signer=size.test_signer,
        text_train=size.text_train, text_dev=size.text_dev,
    )  # fmt: skip
    with progress("signing videos") as show:
        generate(corpus, options, workers, show)
    tokenizer = train_tokenizer(_texts(corpus / "text" / "train.jsonl"), out / "tokenizer", VOCABULARY)
    pairs_folder = shards / ("text_gloss_free" if gloss_free else "text")
    recipes = "demo_gloss_free" if gloss_free else "demo"
    data = DemoData(shards / "video", pairs_folder, shards / "text_plain", tokenizer, recipes)
    stored = VideoOptions(short_side=options.size, fps=options.fps)
    _pack(Synthetic(corpus), data.video, BuildOptions(video=stored), workers)
    # One sign covers one to three word tokens of the visual encoder; stage 1 sees words repeated like that.
    pairs = Text(
        paths=_text_files(out), templates=[PLAIN_TEMPLATE, PAIR_TEMPLATE], gloss="" if gloss_free else "gloss",
        function_words=sorted(FUNCTION_WORDS) if gloss_free else [], lowercase_gloss=True, repeat_max=3, language="en",
    )  # fmt: skip
    _pack(pairs, data.text, BuildOptions(tokenizer=str(tokenizer)), workers)
    return data


def prepare_plain_text(out: Path, data: DemoData, workers: int) -> None:
    """The sentences alone, without words in sign order: what an ablation of stage 1 reads."""
    plain = Text(paths=_text_files(out), templates=[PLAIN_TEMPLATE], language="en")
    _pack(plain, data.text_plain, BuildOptions(tokenizer=str(data.tokenizer)), workers)


def _text_files(out: Path) -> dict[str, str]:
    return {split: str(out / "corpus" / "text" / f"{split}.jsonl") for split in ("train", "dev")}


def _pack(corpus: Corpus, out: Path, options: BuildOptions, workers: int) -> None:
    """Build a shard set with a progress bar."""
    with progress(f"shards {out.name}") as show:
        build(corpus, out, options, workers, lambda state: show(state.done, state.total))


def _texts(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [PAIR_TEMPLATE.format(gloss=row["gloss"].lower(), text=row["text"]) for row in rows]
    return [row["text"] for row in rows] + pairs
