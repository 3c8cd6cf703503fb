"""The self-contained HTML page of a set's figures and charts: no scripts, no fonts, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from shards.atomic import write_atomic
from shards.format.index import ShardSet
from shards.inspect.plots import Chart, ordered, render

_CSS = """
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#1d2430;--soft:#5b6675;--line:#d9dee6}
@media(prefers-color-scheme:dark){:root{--page:#12151b;--card:#1a1f28;--ink:#e8ebf0;--soft:#9aa5b5;--line:#313947}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink)}
body{font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1200px;margin:0 auto;padding:32px 20px 56px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:16px;margin:36px 0 12px}
p{margin:0;color:var(--soft)}
code{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:12px;margin:24px 0 0}
.tile,figure,.table{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 16px}
.tile b{display:block;font-size:22px;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px}
figure{margin:0;padding:16px 16px 14px}
figure svg{width:100%;height:auto;display:block}
@media(max-width:560px){figure{overflow-x:auto}figure svg{width:520px;max-width:none}}
figcaption{color:var(--soft);font-size:13.5px;margin-top:8px}
.table{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:8px 14px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:600;font-size:13px}
.note{font-size:13.5px;margin-top:8px}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
"""


def write_plots(shard_set: ShardSet, figures: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``NAME.png`` of every chart and ``index.html`` with all of them; existing files are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    written, drawings = [], []
    for chart, image, drawing in render(shard_set, figures):
        write_atomic(folder / f"{chart.name}.png", image)
        drawings.append((chart, drawing))
        written.append(folder / f"{chart.name}.png")
    write_atomic(folder / "index.html", page(figures, drawings).encode())
    return [*written, folder / "index.html"]


def page(figures: dict[str, Any], drawings: Sequence[tuple[Chart, str]]) -> str:
    """The HTML document.

    Args:
        figures: of ``shards.inspect.stats.describe``.
        drawings: each chart with its inline SVG.
    """
    charts = "\n".join(
        f'<figure role="img" aria-label="{escape(chart.caption)}">{svg}<figcaption>{escape(chart.caption)}</figcaption>'
        "</figure>"
        for chart, svg in drawings
    )
    fingerprint = escape(figures["fingerprint"][:16])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(figures["dir"])} – shard set</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<h1>{escape(figures["dir"])}</h1>
<p>{escape(figures["kind"])} shard set, fingerprint <code>{fingerprint}</code></p>
<div class="tiles">{_tiles(figures)}</div>
<h2>Splits</h2>
<div class="table">{_table(figures)}</div>
<p class="note">unknown: words that train does not have. repeated: texts that occurred before in the split.
in train: texts that also occur in train.</p>
<h2>Charts</h2>
<div class="charts">
{charts}
</div>
</main>
</body>
</html>
"""


def _tiles(figures: dict[str, Any]) -> str:
    groups = figures["groups"]
    hours = sum(group["hours"] for group in groups)
    tokens = sum(group["tokens"] for group in groups)
    signers = {name for entry in figures["signers"].values() for name in entry["samples"]}
    values = [
        (f"{sum(group['samples'] for group in groups):,}", "samples"),
        (f"{hours:,.1f}" if hours >= 1 else f"{hours * 60:.1f} min", "hours" if hours >= 1 else "of video"),
        (f"{tokens:,}", "tokens"),
        (f"{len(signers):,}", "signers"),
        (f"{figures['shards']:,}", "shards"),
        (size(figures["bytes"]), "on disk"),
    ]
    shown = {"tokens": bool(tokens), "signers": bool(signers), "hours": hours > 0, "of video": hours > 0}
    return "".join(
        f'<div class="tile"><b>{v}</b><span>{name}</span></div>' for v, name in values if shown.get(name, True)
    )


def size(number: int) -> str:
    """Readable bytes: ``13.8 MB``."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} B"


def _table(figures: dict[str, Any]) -> str:
    text = figures["kind"] == "text"
    unit = "tokens" if text else "s"
    head = ["split", "corpus", "samples", "tokens" if text else "minutes", f"median {unit}", f"p95 {unit}"]
    head += ["words/text", "vocabulary", "unknown", "repeated", "in train", "signers"]
    rows = []
    place = {split: number for number, split in enumerate(ordered([group["split"] for group in figures["groups"]]))}
    for group in sorted(figures["groups"], key=lambda group: (place[group["split"]], group["corpus"])):
        spread = group["length"] if text else group["seconds"]
        known = figures["vocabulary"][group["split"]]
        train = group["split"] == "train"
        amount = f"{group['tokens']:,}" if text else f"{group['hours'] * 60:,.1f}"
        unknown, in_train = "–", "–"
        if not train and known["unknown_words_fraction"] is not None:
            unknown = f"{known['unknown_words_fraction']:.1%}"
            in_train = f"{figures['texts_shared_with_train'][group['split']]:,}"
        row = [group["split"], group["corpus"], f"{group['samples']:,}", amount]
        row += [f"{spread['p50']:,.1f}", f"{spread['p95']:,.1f}", f"{group['words']['mean']:.1f}"]
        row += [f"{group['vocabulary']:,}", unknown, f"{group['repeated_texts']:,}", in_train, f"{group['signers']:,}"]
        rows.append(row)
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
