"""shards.inspect.plots: which charts a set gets, what they say, and that the page stands alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.format.index import ShardSet
from shards.inspect.plots import draw, ordered, split_colours
from shards.inspect.plots_page import page, size, write_plots
from shards.inspect.stats import describe
from tests.unit.shards.shard_sets import in_memory


@pytest.fixture(scope="module")
def video() -> ShardSet:
    rng = np.random.default_rng(0)
    number = 120
    words = [" ".join(f"w{word}" for word in rng.zipf(1.6, rng.integers(1, 14)) % 90) for _ in range(number)]
    return in_memory(
        "video", rng.integers(20, 400, number).tolist(), text=words, text_hash=list(range(number)),
        split=["train"] * 90 + ["dev"] * 15 + ["test"] * 10 + ["test_signer"] * 5,
        signer=[f"signer{n % 30}" for n in range(number)], duration_seconds=rng.uniform(1, 16, number).tolist(),
    )  # fmt: skip


def texts() -> ShardSet:
    return in_memory("text", np.random.default_rng(0).geometric(0.01, 80).tolist())


def test_charts_of_a_video_set(video: ShardSet) -> None:
    charts = {chart.name: chart for chart in draw(video, describe(video, "x"))}
    assert list(charts) == [
        "durations", "words", "text_rate", "vocabulary", "unknown_words", "signers", "utilisation"
    ]  # fmt: skip
    axes = charts["durations"].figure.axes[0]
    assert axes.get_xlabel() == "seconds" and axes.get_ylabel() == "share of the split"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == ["train (90)", "dev (15)", "test (10)", "test_signer (5)"]
    assert charts["vocabulary"].figure.axes[0].get_xscale() == "log"
    assert "The 20 with most samples of 30." in charts["signers"].caption


def test_charts_of_a_text_set() -> None:
    made = texts()
    charts = {chart.name: chart for chart in draw(made, describe(made, "x"))}
    assert list(charts) == ["lengths", "words", "vocabulary", "utilisation"]
    axes = charts["lengths"].figure.axes[0]
    assert axes.get_xlabel() == "tokens per document" and axes.get_xscale() == "log"


def test_one_colour_per_split() -> None:
    colours = split_colours(["test", "zz", "train", "aa", "dev"])
    assert list(colours) == ["train", "dev", "test", "aa", "zz"] == ordered(["aa", "zz", "test", "dev", "train"])
    assert len(set(colours.values())) == 5
    assert split_colours(["dev"])["dev"] == colours["dev"]


class Audit(HTMLParser):
    """Tags and every attribute that could fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]


def test_files(tmp_path: Path) -> None:
    made = texts()
    figures: dict[str, Any] = describe(made, "<b>set</b>")
    written = write_plots(made, figures, tmp_path / "new" / "plots")
    assert [path.name for path in written][-1] == "index.html" and len(written) == 5
    with Image.open(written[0]) as image:
        assert image.size == (1024, 592)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20  # something is drawn
    text = written[-1].read_text()
    audit = Audit()
    audit.feed(text)
    assert audit.fetched == [] and "script" not in audit.tags and audit.tags.count("svg") == 4
    assert "<b>" not in text.partition("<h1>")[2].partition("</h1>")[0]
    assert "var(--ink)" in text and "#1d2430" not in text.partition("</style>")[2].replace("var(", "")
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_plots(made, figures, tmp_path / "new" / "plots")] == before


def test_the_page_names_units(video: ShardSet) -> None:
    shown = re.sub(r"<[^>]+>", " ", page(describe(video, "x"), []))
    assert re.search(r"120 +samples", shown) and re.search(r"30 +signers", shown) and "of video" in shown
    assert "tokens" in page(describe(texts(), "x"), [])


def test_size() -> None:
    assert [size(n) for n in (5, 1500, 2_000_000, 3 * 10**9, 4 * 10**12)] == [
        "5 B",
        "1.5 kB",
        "2.0 MB",
        "3.0 GB",
        "4.0 TB",
    ]
