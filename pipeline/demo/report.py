"""What the demo writes: report.json for machines, a table and curves.png for people."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.resolve import installed_versions, project_commit
from pipeline.demo.stages import StageRun
from pipeline.engine.metrics import read_metrics


@dataclass(slots=True)
class DemoReport:
    """The demo's figures; every one is measured in the run it belongs to."""

    seed: int
    size: str
    num_procs: int
    gloss_free: bool = False
    """Stage 1 saw no glosses (pseudo-glosses from the sentences instead)."""
    perplexity_before: float = 0.0
    perplexity_after: float = 0.0
    retrieval_r1: float = 0.0
    """Video to text R@1 on held-out sentences, percent, by sentence and token similarity together."""
    retrieval_r1_chance: float = 0.0
    retrieval_candidates: int = 0
    bleu4: float = 0.0
    """Unseen sentences, seen signers (split `test`)."""
    bleu4_unseen_signer: float = 0.0
    """Unseen sentences and an unseen signer (split `test_signer`)."""
    rouge_l: float = 0.0
    bleu_signature: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    translations: list[dict[str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=installed_versions)
    commit: str = field(default_factory=project_commit)
    hardware: str = field(default_factory=lambda: f"{platform.machine()}, {os.cpu_count()} cores")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def print_report(report: DemoReport, out: Path) -> None:
    """The stage table and three translations beside their references."""
    from rich.table import Table

    from shards.terminal import table_console

    console = table_console()
    table = Table(title="LLaVA-SLT demo: three stages on the synthetic sign corpus")
    for column in ("stage", "held-out metric", "before", "after", "seconds"):
        table.add_column(column, justify="left" if column in ("stage", "held-out metric") else "right")
    seconds = report.seconds
    table.add_row(
        "continued_pretraining", "perplexity", f"{report.perplexity_before:.1f}", f"{report.perplexity_after:.2f}",
        f"{seconds.get('continued_pretraining', 0):.0f}",
    )  # fmt: skip
    table.add_row(
        "contrastive", f"R@1 % of {report.retrieval_candidates}", f"{report.retrieval_r1_chance:.1f} (chance)",
        f"{report.retrieval_r1:.1f}", f"{seconds.get('contrastive', 0):.0f}",
    )  # fmt: skip
    table.add_row(
        "connector", "BLEU-4, unseen sentences", "", f"{report.bleu4:.1f}", f"{seconds.get('connector', 0):.0f}"
    )
    table.add_row("", "BLEU-4, unseen signer too", "", f"{report.bleu4_unseen_signer:.1f}", "")
    console.print(table)
    console.print(f"BLEU signature: {report.bleu_signature}")
    for pair in report.translations:
        console.print(f"[bold]{pair['id']}[/]\n  reference   {pair['reference']}\n  translation {pair['hypothesis']}")
    console.print(f"total {seconds.get('total', 0):.0f} s; report {out / 'report.json'}")


def draw_curves(runs: list[StageRun], path: Path) -> str:
    """One panel per stage: training loss, and the held-out metric that chose the checkpoint.

    Returns:
        A sentence that says where they are, or what is missing to draw them.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no curves: matplotlib is not installed (pip install 'llava-slt[plots]')"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {
        "continued_pretraining": "eval/perplexity",
        "contrastive": "eval/video_to_text/r1",
        "connector": "eval/bleu4",
    }
    figure = Figure(figsize=(5 * len(runs), 3.6), layout="constrained")
    for number, run in enumerate(runs, 1):
        rows = read_metrics(run.run_dir)
        axes = figure.add_subplot(1, len(runs), number)
        _line(axes, rows, "train/loss", "C0", "training loss")
        axes.set_title(run.stage)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss", color="C0")
        metric = shown[run.stage]
        right = axes.twinx()
        _line(right, rows, metric, "C1", metric, marker="o")
        right.set_ylabel(metric.removeprefix("eval/") + " (held-out)", color="C1")
        if metric == "eval/perplexity":
            right.set_yscale("log")
    FigureCanvasAgg(figure).print_png(str(path))
    return f"curves {path}"


def _line(axes: Any, rows: list[dict[str, object]], name: str, color: str, label: str, marker: str = "") -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    axes.plot([x for x, _ in points], [y for _, y in points], color=color, label=label, marker=marker or None)
