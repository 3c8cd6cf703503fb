"""Arms compared: means over seeds, intervals over sentences, differences from the baseline, and what each arm cost."""

from __future__ import annotations

import dataclasses
import html
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.resolve import installed_versions, project_commit
from pipeline.engine.goodput import read_rows, split
from pipeline.engine.metrics import read_metrics
from pipeline.evaluate.intervals import Difference, Interval, bleu_counts, bleu_of, difference, interval
from pipeline.evaluate.protocols import get_protocol
from pipeline.evaluate.report import PREDICTIONS, read_predictions
from pipeline.experiment.matrix import Arm, Matrix, ScoreSpec, arms, baseline
from pipeline.experiment.run import folder_of
from pipeline.experiment.steps import Trial
from shards.atomic import write_atomic


@dataclass(frozen=True, slots=True)
class Cell:
    """A score of an arm."""

    values: list[float]
    """By seed; seeds that failed are absent."""
    interval: Interval | None = None
    """Of the mean over seeds, over sentences; of translations only."""
    difference: Difference | None = None
    """From the baseline; of translations only."""

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True, slots=True)
class Row:
    """An arm."""

    arm: Arm
    cells: dict[str, Cell] = field(default_factory=dict)
    compute: list[float] = field(default_factory=list)
    """By seed, as `ComputeSpec.measure` says."""
    unequal: str = ""
    """How its compute differs from the baseline's, if by more than allowed."""


def table(matrix: Matrix, trials: Sequence[Trial]) -> list[Row]:
    """A row per arm, the baseline first; only what is finished counts."""
    reference = baseline(matrix)
    rows = []
    base_counts: dict[str, np.ndarray | None] = {}  # of the baseline, which comes first
    base_compute = [_compute(matrix, trial) for trial in _of(trials, reference)]
    for arm in arms(matrix):
        mine = _of(trials, arm)
        cells = {}
        for score in matrix.scores:
            counts = _counts(matrix, mine, score)
            cell = _cell(mine, score, counts, base_counts.get(score.name))
            if arm == reference:
                base_counts[score.name] = counts
            if cell is not None:
                cells[score.name] = cell
        compute = [_compute(matrix, trial) for trial in mine]
        rows.append(Row(arm, cells, [cost for cost in compute if cost], _unequal(matrix, compute, base_compute)))
    return rows


def write_reports(matrix: Matrix, rows: Sequence[Row], failures: Sequence[str]) -> list[Path]:
    """``report.json``, ``report.md`` and ``report.html`` in the experiment's folder."""
    out = Path(matrix.out)
    content = {
        "name": matrix.name, "matrix": matrix.model_dump(mode="json"), "failures": list(failures),
        "arms": [_as_json(row) for row in rows], "versions": installed_versions(), "commit": project_commit(),
    }  # fmt: skip
    texts = {
        "report.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        "report.md": markdown(matrix, rows, failures),
        "report.html": page(matrix, rows, failures),
    }
    for name, text in texts.items():
        write_atomic(out / name, text)
    return [out / name for name in texts]


def cells_of(matrix: Matrix, row: Row) -> list[str]:
    """The row in words, one cell per column of `columns`."""
    words = [row.arm.name]
    for score in matrix.scores:
        cell = row.cells.get(score.name)
        words += [*_score_words(cell), *([] if score.shards is None else [_difference_words(cell)])]
    if matrix.compute is not None:
        words.append(f"{statistics.mean(row.compute):,.0f}{row.unequal}" if row.compute else "-")
    return words


def columns(matrix: Matrix) -> list[str]:
    """Headings."""
    found = ["arm"]
    for score in matrix.scores:
        found += [score.name, "seeds"]
        if score.shards is not None:
            found.append("against the baseline")
    if matrix.compute is not None:
        found.append(f"{matrix.compute.measure} of training")
    return found


def notes(matrix: Matrix, failures: Sequence[str]) -> list[str]:
    """What a reader of the table must know."""
    found = []
    if any(score.shards is not None for score in matrix.scores):
        found.append(
            "BLEU-4 is the mean over seeds +- their standard deviation, with the 95 % interval of 1,000 resamples of "
            "the sentences (paired bootstrap; every seed of an arm is resampled alike). p is two-sided."
        )
    if len(matrix.seeds) < 3:
        found.append(f"Only {len(matrix.seeds)} seeds: differences between arms may be those between seeds.")
    found += [f"FAILED: {failure}" for failure in failures]
    return found


def markdown(matrix: Matrix, rows: Sequence[Row], failures: Sequence[str]) -> str:
    """The table for a page."""
    head = columns(matrix)
    lines = [f"# {matrix.name}", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(cells_of(matrix, row))} |" for row in rows]
    lines += ["", *notes(matrix, failures), f"Commit {project_commit()}.", ""]
    return "\n".join(lines)


def page(matrix: Matrix, rows: Sequence[Row], failures: Sequence[str]) -> str:
    """The table as a page of its own."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", cells_of(matrix, row)) for row in rows)
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes(matrix, failures))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(matrix.name)}</title><style>:root{{color-scheme:light dark}}"
        "body{font:16px/1.5 system-ui;margin:2rem;max-width:70rem}table{border-collapse:collapse}"
        "th,td{padding:.3rem .8rem;text-align:left;border-bottom:1px solid #8888}</style>"
        f"<h1>{html.escape(matrix.name)}</h1><table>{line('th', columns(matrix))}{body}</table>{below}"
        f"<p>Commit {html.escape(project_commit())}.</p></html>\n"
    )


def _of(trials: Sequence[Trial], arm: Arm) -> list[Trial]:
    return [trial for trial in trials if trial.arm == arm]


def _counts(matrix: Matrix, trials: Sequence[Trial], score: ScoreSpec) -> np.ndarray | None:
    """BLEU counts of every finished seed, [K, S, 10]; None without any, and for a metric of training."""
    if score.shards is None:
        return None
    protocol, runs = get_protocol(score.protocol), []
    for trial in trials:
        path = folder_of(matrix, trial, score) / PREDICTIONS
        if path.is_file():
            found = read_predictions(path)
            runs.append(bleu_counts([p.hypothesis for p in found], [[p.reference] for p in found], protocol))
    return np.stack(runs) if runs else None


def _cell(trials: Sequence[Trial], score: ScoreSpec, runs: np.ndarray | None, base: np.ndarray | None) -> Cell | None:
    if score.metric is not None:
        values = [value for trial in trials if (value := _metric(trial, score)) is not None]
        return Cell(values) if values else None
    if runs is None:
        return None
    values = bleu_of(runs.sum(1)).tolist()
    return Cell(values, interval(runs), None if base is None else difference(runs, base))


def _metric(trial: Trial, score: ScoreSpec) -> float | None:
    """A held-out metric of a step's training, as it was when the exported checkpoint was saved."""
    step = trial.step(score.step)
    if not step.is_exported:
        return None
    metrics = json.loads((step.export / "provenance.json").read_text(encoding="utf-8"))["metrics"]
    return float(metrics[score.metric]) if score.metric in metrics else None


def _compute(matrix: Matrix, trial: Trial) -> float | None:
    """Cost of a trial's trainings together; None if one is missing."""
    if matrix.compute is None or not all(step.is_exported for step in trial.steps):
        return None
    total = 0.0
    for step in trial.steps:
        last = read_metrics(step.folder)[-1]["step"]
        batch = json.loads((step.folder / "ds_config.resolved.json").read_text(encoding="utf-8"))["train_batch_size"]
        seconds = split(read_rows(step.folder)).seconds["step"]
        total += {"seconds": seconds, "samples": float(last * batch), "steps": float(last)}[matrix.compute.measure]
    return total


def _unequal(matrix: Matrix, mine: Sequence[float | None], base: Sequence[float | None]) -> str:
    costs, others = [c for c in mine if c], [c for c in base if c]
    if matrix.compute is None or not costs or not others:
        return ""
    ratio = statistics.mean(costs) / statistics.mean(others)
    return f" (UNEQUAL: {ratio:.2f} of the baseline)" if abs(ratio - 1) > matrix.compute.within else ""


def _score_words(cell: Cell | None) -> list[str]:
    if cell is None:
        return ["-", "0"]
    spread = "" if cell.deviation is None else f" +- {cell.deviation:.1f}"
    between = "" if cell.interval is None else f" ({cell.interval.low:.1f} to {cell.interval.high:.1f})"
    return [f"{cell.mean:.1f}{spread}{between}", str(len(cell.values))]


def _difference_words(cell: Cell | None) -> str:
    if cell is None or cell.difference is None:
        return ""
    found = cell.difference
    return f"{found.score:+.1f} ({found.low:+.1f} to {found.high:+.1f}), p = {found.p:.3f}"


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "arm": dict(row.arm.values), "compute": row.compute, "unequal_compute": bool(row.unequal),
        "scores": {
            name: {
                "values": cell.values, "mean": cell.mean, "deviation": cell.deviation,
                "interval": cell.interval and dataclasses.asdict(cell.interval),
                "difference": cell.difference and dataclasses.asdict(cell.difference),
            }
            for name, cell in row.cells.items()
        },
    }  # fmt: skip
