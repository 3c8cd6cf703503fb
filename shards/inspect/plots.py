"""Charts of a shard set: PNG files for papers and slides, and one self-contained HTML page for the browser.

Every split has one colour in every chart. The charts of the page are inline SVG whose ink follows the page's theme.
"""

from __future__ import annotations

import collections
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.errors import OptionError
from shards.format.index import ShardSet
from shards.inspect.stats import all_words, lengths, word_counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FIXED = {"train": "#4c78d0", "dev": "#e08a2c", "test": "#2f9e77"}
_OTHERS = ("#a05fb4", "#d1556b", "#8a8f3a", "#3fa7bf", "#8c6d5a", "#7a7f89")
# Colours that an inline SVG replaces by the page's own; no chart uses them for anything else.
_INK, _SOFT, _LINE = "#1d2430", "#5b6675", "#d9dee6"
_STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 24, "axes.titlecolor": _INK, "axes.labelcolor": _SOFT,
    "axes.edgecolor": _LINE, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.axisbelow": True, "axes.labelpad": 7, "text.color": _INK, "xtick.color": _SOFT, "ytick.color": _SOFT,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "grid.color": _LINE, "grid.linewidth": 0.8, "legend.frameon": False, "legend.fontsize": 9,
    "figure.facecolor": "white", "savefig.facecolor": "white", "svg.fonttype": "none", "svg.hashsalt": "shards",
}  # fmt: skip
_INCHES, _DPI = (6.4, 3.7), 160
_MOST_SIGNERS, _MOST_POINTS = 20, 4000


@dataclass(frozen=True)
class Chart:
    """One chart: file stem, figure, and a sentence that describes it."""

    name: str
    figure: Figure
    caption: str


def split_colours(splits: Sequence[str]) -> dict[str, str]:
    """A colour per split: always the same for train, dev and test, the others in alphabetical order."""
    others = [split for split in sorted(splits) if split not in _FIXED]
    free = {split: _OTHERS[number % len(_OTHERS)] for number, split in enumerate(others)}
    return {split: (_FIXED | free)[split] for split in ordered(splits)}


def ordered(splits: Sequence[str]) -> list[str]:
    """Splits in reading order: train, dev, test, then the others by name."""
    known = [split for split in _FIXED if split in splits]
    return known + sorted(set(splits) - set(known))


def need_matplotlib(where: str) -> None:
    """Raise OptionError when charts cannot be drawn here; asked before the work whose charts are wanted."""
    if importlib.util.find_spec("matplotlib") is None:
        fix = "pip install 'llava-slt[plots]'"
        raise OptionError("charts need matplotlib, which is not installed", where=where, fix=fix)


def draw(shard_set: ShardSet, figures: dict[str, Any]) -> list[Chart]:
    """All charts for which this set has data.

    Args:
        shard_set: opened with all columns.
        figures: of ``shards.inspect.stats.describe``.
    """
    import matplotlib as mpl

    makers: tuple[Callable[[_Data], Chart | None], ...] = (
        _lengths_chart, _words_chart, _rate_chart, _vocabulary_chart, _unknown_chart, _signers_chart,
        _utilisation_chart,
    )  # fmt: skip
    data = _Data.of(shard_set, figures)
    with mpl.rc_context(_STYLE):
        charts = [maker(data) for maker in makers]
    return [chart for chart in charts if chart is not None]


def render(shard_set: ShardSet, figures: dict[str, Any]) -> list[tuple[Chart, bytes, str]]:
    """Every chart of ``draw`` with its PNG and its SVG for the page."""
    import matplotlib as mpl

    rendered = []
    with mpl.rc_context(_STYLE):
        for chart in draw(shard_set, figures):
            image, drawing = io.BytesIO(), io.StringIO()
            chart.figure.savefig(image, format="png", dpi=_DPI, metadata={"Software": None})
            chart.figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            rendered.append((chart, image.getvalue(), themed(drawing.getvalue())))
    return rendered


def themed(svg: str) -> str:
    """An SVG document as inline markup whose ink is CSS variables."""
    inline = svg[svg.index("<svg") :]
    for colour, variable in ((_INK, "--ink"), (_SOFT, "--soft"), (_LINE, "--line")):
        inline = inline.replace(colour, f"var({variable})")
    return inline


@dataclass(frozen=True)
class _Data:
    """The columns the charts need, once."""

    kind: str
    figures: dict[str, Any]
    colours: dict[str, str]
    split: NDArray[Any]
    lengths: NDArray[np.int64]
    seconds: NDArray[np.float64]
    words: NDArray[np.int64]
    characters: NDArray[np.int64]
    counts: dict[str, collections.Counter[str]]
    """Occurrences of every word, per split."""

    @classmethod
    def of(cls, shard_set: ShardSet, figures: dict[str, Any]) -> _Data:
        table = shard_set.table
        texts = all_words(table)
        return cls(
            kind=shard_set.manifest.kind,
            figures=figures,
            colours=split_colours(list(shard_set.manifest.splits)),
            split=np.asarray(table["split"].to_pylist(), dtype=object),
            lengths=lengths(table),
            seconds=table["duration_seconds"].to_numpy(),
            words=np.asarray([len(text) for text in texts], dtype=np.int64),
            characters=pc.utf8_length(table["text"]).to_numpy().astype(np.int64),
            counts=word_counts(table, texts),
        )

    def of_split(self, values: NDArray[Any]) -> Iterator[tuple[str, str, NDArray[Any]]]:
        for split, colour in self.colours.items():
            yield split, colour, values[self.split == split]


def _new(title: str, x: str, y: str, grid: str = "y") -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis=grid)  # type: ignore[arg-type]
    return figure, axes


def _legend(axes: Axes, columns: int) -> None:
    """Names of the splits on one line under the title."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.1,
                columnspacing=1.3, borderpad=0.1)  # fmt: skip


def _histogram(data: _Data, values: NDArray[Any], texts: tuple[str, str], name: str, caption: str) -> Chart:
    """Share of each split per bin: splits of very different sizes stay comparable."""
    from matplotlib.ticker import PercentFormatter

    title, unit = texts
    figure, axes = _new(title, unit, "share of the split")
    shown = values[values > 0]
    low, high = float(shown.min()), float(shown.max())
    wide = high > 30 * max(low, 1e-9)
    whole = np.issubdtype(values.dtype, np.integer)
    largest = max(len(part) for _, _, part in data.of_split(values))
    number = int(np.clip(2 * largest ** (1 / 3), 8, 36))  # Rice's rule: few samples in many bins show only noise
    if wide:
        bins = np.geomspace(low, high * 1.001, number)
        bins = np.unique(np.round(bins)) if whole else bins
        axes.set_xscale("log")
    else:
        step = max(1.0, np.ceil((high - low + 1) / number)) if whole else (high - low) / number or 1.0
        bins = np.arange(low - 0.5, high + step, step) if whole else np.arange(low, high + step, step)
    edges: list[float] = bins.tolist()
    for split, colour, part in data.of_split(values):
        weights = np.full(len(part), 1 / max(1, len(part)))
        label = f"{split} ({len(part):,})"
        axes.hist(part, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.16)
        axes.hist(part, edges, weights=weights, histtype="step", color=colour, linewidth=1.7, label=label)
    if wide:
        _plain_log(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.margins(x=0.01)
    _legend(axes, 4)
    return Chart(name, figure, caption)


def _annotate(axes: Axes, text: str, place: tuple[float, float], offset: tuple[int, int], **options: Any) -> None:
    """A small label ``offset`` points beside a place in data coordinates."""
    axes.annotate(text, place, offset, textcoords="offset points", fontsize=8.5, **options)


def _plain_log(axes: Axes) -> None:
    """1, 2, 5, 10 rather than powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _lengths_chart(data: _Data) -> Chart:
    if data.kind == "text":
        caption = "Tokens per document. Documents are packed into blocks; only those longer than a block are cut."
        return _histogram(data, data.lengths, ("Document length", "tokens per document"), "lengths", caption)
    caption = "Duration of the videos. Splits that differ here are trained and scored on different signing."
    return _histogram(data, data.seconds, ("Duration", "seconds"), "durations", caption)


def _words_chart(data: _Data) -> Chart:
    caption = "Words per text, without punctuation; characters where the language writes no spaces."
    return _histogram(data, np.maximum(data.words, 1), ("Text length", "words per text"), "words", caption)


def _rate_chart(data: _Data) -> Chart | None:
    """Every video: its duration against the length of its text."""
    if data.kind == "text" or not (data.seconds > 0).any():
        return None
    figure, axes = _new("Text against time", "duration (seconds)", "characters", grid="both")
    some = np.random.default_rng(0).permutation(len(data.seconds))[:_MOST_POINTS]
    for split, colour in data.colours.items():
        part = some[data.split[some] == split]
        axes.scatter(data.seconds[part], data.characters[part], 13, colour, alpha=0.55, linewidths=0, label=split)
    reach = np.asarray([0.0, float(data.seconds.max()) * 1.03])
    top = float(data.characters.max()) * 1.08
    for rate in (10, 25, 60):
        axes.plot(reach, reach * rate, color=_SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        x = min(reach[1] * 0.95, top * 0.95 / rate)
        _annotate(axes, f"{rate}/s", (x, x * rate), (5, -3), color=_SOFT)
    axes.set_xlim(0, reach[1])
    axes.set_ylim(0, top)
    _legend(axes, 4)
    for handle in axes.get_legend().legend_handles:  # type: ignore[union-attr]
        handle.set_sizes([34])  # type: ignore[union-attr]
        handle.set_alpha(1)  # type: ignore[union-attr]
    caption = "Dashed: characters per second."
    return Chart("text_rate", figure, caption)


def _vocabulary_chart(data: _Data) -> Chart | None:
    """Word frequency over rank, both logarithmic, for every split."""
    counts = data.counts
    if not any(counter for counter in counts.values()):
        return None
    figure, axes = _new("Word frequencies", "rank of the word", "occurrences", grid="both")
    for split, colour in data.colours.items():
        values = np.asarray(sorted(counts.get(split, {}).values(), reverse=True))
        if len(values):
            single = float((values == 1).mean())
            label = f"{split}: {len(values):,} words, {single:.0%} once"
            axes.plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=1.9, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_log(axes)
    axes.yaxis.set_major_formatter(axes.xaxis.get_major_formatter())
    axes.legend(loc="upper right", handlelength=1.1)
    caption = "How often each word occurs, commonest first. Words that occur once can hardly be learned."
    return Chart("vocabulary", figure, caption)


def _unknown_chart(data: _Data) -> Chart | None:
    """Words of the other splits that train does not have."""
    from matplotlib.ticker import PercentFormatter

    vocabulary = {split: values for split, values in data.figures["vocabulary"].items() if split != "train"}
    if not vocabulary or "train" not in data.figures["vocabulary"]:
        return None
    names = [split for split in data.colours if split in vocabulary]
    figure, axes = _new("Words that train does not know", "share of the split", "", grid="x")
    rows = np.arange(len(names))[::-1]
    kinds = [vocabulary[name]["unknown_vocabulary"] / max(1, vocabulary[name]["vocabulary"]) for name in names]
    running = [vocabulary[name]["unknown_words_fraction"] for name in names]
    colours = [data.colours[name] for name in names]
    for offset, values, alpha, what in ((0.2, kinds, 0.45, "of its vocabulary"), (-0.2, running, 1.0, "of its text")):
        axes.barh(rows + offset, values, 0.36, color=colours, alpha=alpha)
        for row, value in zip(rows, values, strict=True):
            text = f"{value:.1%} {what}"
            _annotate(axes, text, (value, row + offset), (5, 0), va="center")
    axes.set_yticks(rows, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, min(1.35, max(*kinds, *running, 0.02) * 1.45))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return Chart("unknown_words", figure, "Words of the other splits that the train split does not contain.")


def _signers_chart(data: _Data) -> Chart | None:
    """Samples of each signer, stacked by split."""
    totals: dict[str, int] = {}
    for entry in data.figures["signers"].values():
        for name, number in entry["samples"].items():
            totals[name] = totals.get(name, 0) + number
    if len(totals) < 2:
        return None
    names = sorted(totals, key=lambda name: (-totals[name], name))[:_MOST_SIGNERS]
    figure, axes = _new("Signers", "samples", "", grid="x")
    figure.set_size_inches(_INCHES[0], max(_INCHES[1], 1.5 + 0.26 * len(names)))
    rows, left = np.arange(len(names))[::-1], np.zeros(len(names))
    for split, colour in data.colours.items():
        known = data.figures["signers"].get(split, {"samples": {}})["samples"]
        part = np.asarray([known.get(name, 0) for name in names])
        if part.any():
            axes.barh(rows, part, 0.72, left=left, color=colour, label=split)
        left += part
    axes.set_yticks(rows, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    _legend(axes, 4)
    more = f" The {_MOST_SIGNERS} with most samples of {len(totals):,}." if len(totals) > _MOST_SIGNERS else ""
    return Chart("signers", figure, f"Samples per signer. A signer of dev or test without train bars is unseen.{more}")


def _utilisation_chart(data: _Data) -> Chart | None:
    """The cost of padding, without and with the best arrangement."""
    from matplotlib.ticker import PercentFormatter

    utilisation = data.figures["utilisation"]
    if not data.lengths.any():
        return None
    figure, axes = _new("How full batches are", utilisation["unit"], "not padding")
    places = np.arange(len(utilisation["rows"]))
    for offset, name, colour in ((-0.2, "plain", "#9aa3b2"), (0.2, "best", _FIXED["train"])):
        values = [row[name] for row in utilisation["rows"]]
        axes.bar(places + offset, values, 0.37, color=colour, label=utilisation[name])
        for place, value in zip(places, values, strict=True):
            _annotate(axes, f"{value:.0%}", (place + offset, value), (0, 3), ha="center")
    axes.set_xticks(places, [f"{row['size']:,}" for row in utilisation["rows"]])
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend(axes, 2)
    caption = "The part of a batch that is data; the rest is padding that costs time and memory."
    return Chart("utilisation", figure, caption)
