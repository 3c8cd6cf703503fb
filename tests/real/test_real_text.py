"""Real texts: overlaps and duplicates counted here in plain Python, languages, parallel glosses, markdown."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from shards.corpora.parallel import Parallel
from shards.corpora.phoenix14t import Phoenix14T
from shards.corpora.text import Text
from shards.corpora.unpickle import safe_unpickle
from shards.filter.corpus import filtered
from shards.filter.options import FilterOptions

pytestmark = pytest.mark.real


def excluded(corpus: object, **options: object) -> dict[str, int]:
    report = filtered(corpus, FilterOptions(**options)).report()  # type: ignore[arg-type]
    return report["excluded"]


@pytest.fixture(scope="module")
def how2sign(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sentences of How2Sign's train split, one a line."""
    rows = safe_unpickle(shared_data / "how2sign" / "labels.train")
    path = tmp_path_factory.mktemp("how2sign") / "train.txt.gz"
    path.write_bytes(gzip.compress("".join(row["text"].strip() + "\n" for row in rows.values()).encode()))
    return path


def test_phoenix_dev_texts_that_occur_in_train(shared_data: Path) -> None:
    corpus = Phoenix14T(shared_data / "phoenix2014t")
    train = [segment.text for segment in corpus.segments() if segment.split == "train"]
    dev = [segment.text for segment in corpus.segments() if segment.split == "dev"]
    report = filtered(corpus, FilterOptions(contamination="auto")).report()
    assert report["excluded"] == {}, "official splits stay as they are"
    (split,) = report["contamination"]["splits"]
    assert split["texts"] == 519 and split["exact"] == sum(text in set(train) for text in dev) == 25
    assert report["contamination"]["train_exact"] == sum(text in set(dev) for text in train)

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[at : at + 8]) for at in range(len(words) - 7)}

    in_train = [grams(text) for text in train]
    near = sum(
        text not in set(train) and any(len(own & other) >= 0.8 * len(own) for other in in_train)
        for text in dev
        if (own := grams(text))
    )
    assert split["near"] == near
    gone = excluded(corpus, contamination="exclude")
    assert gone == {"contamination": report["contamination"]["train_exact"] + report["contamination"]["train_near"]}


def test_duplicates_of_real_corpora(shared_data: Path, how2sign: Path) -> None:
    phoenix = Phoenix14T(shared_data / "phoenix2014t")
    train = [segment.text for segment in phoenix.segments() if segment.split == "train"]
    assert excluded(phoenix, exact_duplicates=True) == {"duplicate": len(train) - len(set(train))}
    lines = gzip.decompress(how2sign.read_bytes()).decode().splitlines()
    corpus = Text(paths={"train": str(how2sign)})
    found = [
        segment for segment in filtered(corpus, FilterOptions(exact_duplicates=True)).segments() if segment.excluded
    ]
    equal = sum(number - 1 for number in Counter(line for line in lines if line).values())
    assert equal <= len(found) <= 1.1 * equal and equal > 300
    near = excluded(corpus, exact_duplicates=True, near_duplicates=0.8)
    assert near["duplicate"] == len(found) and 0 < near["near_duplicate"] < 300


def test_languages_of_real_corpora(shared_data: Path, how2sign: Path) -> None:
    german = Phoenix14T(shared_data / "phoenix2014t", splits=["train"])
    english = Text(paths={"train": str(how2sign)})
    nzsl = Text(paths={"train": str(shared_data / "nzsl" / "nzsl_usage.tsv")}, text="translation")
    assert excluded(german, languages=["de"]).get("language", 0) <= 2
    assert excluded(english, languages=["en"]).get("language", 0) <= 10
    assert excluded(nzsl, languages=["en"]).get("language", 0) <= 2
    long = sum(len(segment.text) >= 40 for segment in german.segments())
    assert excluded(german, languages=["en"])["language"] >= 0.99 * long


def test_aslg_pairs(shared_data: Path) -> None:
    folder = shared_data / "aslg_pc12"
    corpus = Parallel(text={"dev": str(folder / "aslg.dev.en")}, gloss={"dev": str(folder / "aslg.dev.gloss.asl")})
    segments = list(corpus.segments())
    assert len(segments) == 4000 and all(segment.text for segment in segments)


def test_the_survey_as_paragraphs(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "survey.txt").symlink_to(shared_data / "slp_book" / "index.md")
    corpus = Text(paths={"train": str(tmp_path / "survey.txt")}, unit="paragraph")
    segments = list(corpus.segments())
    assert len(segments) > 250 and sum(len(segment.text.split()) for segment in segments) > 15_000
    kept = [
        s.text
        for s in filtered(corpus, FilterOptions(min_words=8, max_symbol_fraction=0.3)).segments()
        if not s.excluded
    ]
    assert 100 < len(kept) < len(segments) and not any(text.startswith("```") and len(text) < 10 for text in kept)
    json.dumps(filtered(corpus, FilterOptions()).report())
