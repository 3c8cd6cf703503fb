"""`slt demo`: from nothing to translated videos on this machine, through the launcher, exports and evaluation that a
real run uses. Steps whose result already exists are not repeated, so an interrupted demo continues.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from pipeline.demo.data import DemoData, prepare
from pipeline.demo.report import DemoReport, draw_curves, print_report
from pipeline.demo.settings import SIZES, DemoSize
from pipeline.demo.stages import StageRun, run_stage
from pipeline.errors import EXIT_OK, RecipeError
from shards.terminal import table_console

logger = logging.getLogger(__name__)

TRANSLATIONS_SHOWN = 3


def run_demo(out: Path, seed: int, num_procs: int, size: str, gloss_free: bool = False) -> int:
    """Run everything below ``out``; returns the exit code.

    Raises:
        RecipeError: unknown size.
        StageFailedError: a stage failed; its log is named.
    """
    if size not in SIZES:
        raise RecipeError(f"demo size {size!r} is not one of {', '.join(SIZES)}")
    start = time.monotonic()
    report = DemoReport(seed=seed, size=size, num_procs=num_procs, gloss_free=gloss_free)
    data = prepare(out, SIZES[size], seed, num_procs, gloss_free)
    report.seconds["data"] = time.monotonic() - start
    runs = run_stages(out, data, SIZES[size], seed, num_procs)
    fill_report(report, out, data, runs)
    report.seconds["total"] = time.monotonic() - start
    report.write(out / "report.json")
    print_report(report, out)
    table_console().print(draw_curves(runs, out / "curves.png"), markup=False)
    return EXIT_OK


def run_stages(out: Path, data: DemoData, size: DemoSize, seed: int, num_procs: int) -> list[StageRun]:
    """The three stages, each reading the exports of those before it."""
    llm, encoder = out / "continued_pretraining" / "export", out / "contrastive" / "export"
    text = [f"data.train=[{{shards: {data.text}}}]", f"data.eval=[{{shards: {data.text}, split: dev}}]"]
    video = [f"data.train=[{{shards: {data.video}}}]", f"data.eval=[{{shards: {data.video}, split: dev}}]"]
    sets = {
        "continued_pretraining": [*text, f"model.llm.tokenizer={data.tokenizer}"],
        "contrastive": [*video, f"model.text_encoder.path={llm}"],
        "connector": [*video, f"model.llm.path={llm}", f"model.visual.path={encoder}"],
    }
    runs = []
    for stage, values in sets.items():
        runs.append(
            run_stage(
                stage,
                out / stage,
                num_procs,
                [*values, f"seed={seed}", *size.sets.get(stage, [])],
                f"{data.recipes}_{stage}",
            )
        )
    return runs


def evaluate_split(export_dir: Path, data: DemoData, split: str, out: Path) -> dict[str, float | str]:
    """Translate one held-out split with an exported model and score it."""
    from pipeline.evaluate.run import EvaluateOptions, evaluate_export

    scores = evaluate_export(export_dir, [data.video], out, EvaluateOptions(split=split, micro_batch=32))
    assert scores is not None  # a single process is rank 0
    return {"bleu4": scores.bleu4, "rouge_l": scores.rouge_l, "signature": scores.signatures["bleu"]}


def fill_report(report: DemoReport, out: Path, data: DemoData, runs: list[StageRun]) -> None:
    """Collect every figure from what the runs wrote."""
    text, contrastive, connector = runs
    report.seconds |= {run.stage: run.seconds for run in runs}
    first, last = text.evaluations()[0], text.evaluations()[-1]
    report.perplexity_before, report.perplexity_after = first["eval/perplexity"], last["eval/perplexity"]
    best = max(contrastive.evaluations(), key=lambda row: row["eval/video_to_text/r1"])
    report.retrieval_r1 = best["eval/video_to_text/r1"]
    report.retrieval_r1_chance = best["eval/video_to_text/chance_r1"]
    report.retrieval_candidates = round(100 / report.retrieval_r1_chance)
    start = time.monotonic()
    test = evaluate_split(connector.export_dir, data, "test", out / "evaluation" / "test")
    test_signer = evaluate_split(connector.export_dir, data, "test_signer", out / "evaluation" / "test_signer")
    report.seconds["evaluation"] = time.monotonic() - start
    report.bleu4, report.bleu4_unseen_signer = float(test["bleu4"]), float(test_signer["bleu4"])
    report.rouge_l, report.bleu_signature = float(test["rouge_l"]), str(test["signature"])
    report.translations = read_translations(out / "evaluation" / "test")[:TRANSLATIONS_SHOWN]


def read_translations(folder: Path) -> list[dict[str, str]]:
    """Predictions of an evaluation, in order."""
    import pyarrow.parquet as parquet

    rows = parquet.read_table(folder / "predictions.parquet").to_pylist()
    return [{"id": row["sample_id"], "reference": row["reference"], "hypothesis": row["hypothesis"]} for row in rows]


def load_report(out: Path) -> dict[str, object]:
    """report.json of a finished demo."""
    return json.loads((out / "report.json").read_text(encoding="utf-8"))
