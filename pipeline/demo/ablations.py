"""What each stage is worth: the demo with one thing taken away, each variant with several seeds.

Variants share every stage they have in common with the full pipeline, so only what differs is trained again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.resolve import installed_versions, project_commit
from pipeline.demo.data import DemoData, prepare, prepare_plain_text
from pipeline.demo.run import evaluate_split, run_stages
from pipeline.demo.settings import ABLATION
from pipeline.demo.stages import is_exported, run_stage_once
from pipeline.errors import EXIT_OK, RecipeError

logger = logging.getLogger(__name__)

# One step at a learning rate of (almost) nothing: the export is the random initialisation.
_UNTRAINED = [
    "train.steps=1", "train.optimizer.warmup_steps=0", "train.optimizer.lr=1.0e-30", "train.optimizer.weight_decay=0",
    "train.eval_every_steps=0", "train.checkpoint.every_steps=0",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trial:
    """One seed's run folders and inputs."""

    out: Path
    data: DemoData
    seed: int
    num_procs: int

    def stage(self, variant: str, stage: str, sets: list[str], untrained: bool = False) -> Path:
        """Run a stage of a variant (``untrained``: only export its random initialisation); returns its export."""
        values = [*sets, f"seed={self.seed}", *ABLATION.sets[stage], *(_UNTRAINED if untrained else [])]
        return run_stage_once(stage, self.out / variant / stage, self.num_procs, values)

    def text(self, shards: Path) -> list[str]:
        return [
            f"data.train=[{{shards: {shards}}}]", f"data.eval=[{{shards: {self.data.text}, split: dev}}]",
            f"model.llm.tokenizer={self.data.tokenizer}",
        ]  # fmt: skip

    def video(self, paths: dict[str, Path]) -> list[str]:
        """``paths``: part of the model -> the export it is loaded from."""
        source = self.data.video
        fixed = [f"data.train=[{{shards: {source}}}]", f"data.eval=[{{shards: {source}, split: dev}}]"]
        return fixed + [f"model.{part}.path={path}" for part, path in paths.items()]

    def full(self, stage: str) -> Path:
        """Export of a stage of the full pipeline; runs the stage first if it is missing."""
        if not is_exported(self.out / stage):
            run_stages(self.out, self.data, ABLATION, self.seed, self.num_procs)
        return self.out / stage / "export"


def full(trial: Trial) -> Path:
    """All three stages."""
    return trial.full("connector")


def without_stage_1(trial: Trial) -> Path:
    """The LLM keeps its random weights; the encoder is the full pipeline's, the connector is trained as usual."""
    name = "without_stage_1"
    llm = trial.stage(name, "continued_pretraining", trial.text(trial.data.text), untrained=True)
    return trial.stage(name, "connector", trial.video({"llm": llm, "visual": trial.full("contrastive")}))


def without_sign_pairs(trial: Trial) -> Path:
    """Stage 1 sees plain sentences only, never words in sign order: language without the sign domain; the encoder is
    the full pipeline's."""
    name = "without_sign_pairs"
    prepare_plain_text(trial.out, trial.data, trial.num_procs)
    llm = trial.stage(name, "continued_pretraining", trial.text(trial.data.text_plain))
    return trial.stage(name, "connector", trial.video({"llm": llm, "visual": trial.full("contrastive")}))


def without_stage_2(trial: Trial) -> Path:
    """The visual encoder keeps its random weights (it is frozen in stage 3, as in the paper)."""
    name, llm = "without_stage_2", trial.full("continued_pretraining")
    encoder = trial.stage(name, "contrastive", trial.video({"text_encoder": llm}), untrained=True)
    return trial.stage(name, "connector", trial.video({"llm": llm, "visual": encoder}))


def frame_tokens(trial: Trial) -> Path:
    """The LLM reads frame-level tokens of the same encoder instead of word-level ones."""
    paths = {"llm": trial.full("continued_pretraining"), "visual": trial.full("contrastive")}
    return trial.stage("frame_tokens", "connector", [*trial.video(paths), "model.connector.tokens=frame"])


VARIANTS: dict[str, Callable[[Trial], Path]] = {
    variant.__name__: variant for variant in (full, without_stage_1, without_sign_pairs, without_stage_2, frame_tokens)
}


def run_ablations(out: Path, seeds: int, num_procs: int, variants: list[str]) -> int:
    """Run variants with seeds 0..seeds-1 and print the table.

    ``ablations.json`` is written after each; results in it are not run again, so an interrupted table continues.

    Raises:
        RecipeError: an unknown variant.
    """
    unknown = sorted(set(variants) - VARIANTS.keys())
    if unknown:
        raise RecipeError(f"unknown ablation {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    results = _read(out / "ablations.json")
    for seed in range(seeds):
        missing = [name for name in variants or VARIANTS if all(row["seed"] != seed for row in results[name])]
        if not missing:
            continue
        folder = out / f"seed-{seed}"
        trial = Trial(folder, prepare(folder, ABLATION, seed, num_procs), seed, num_procs)
        for name in missing:
            export_dir = VARIANTS[name](trial)
            scores = {
                split: evaluate_split(export_dir, trial.data, split, folder / "evaluation" / name / split)
                for split in ("test", "test_signer")
            }
            results[name].append({"seed": seed, **scores})
            _write(out / "ablations.json", results)
    print_table(results)
    return EXIT_OK


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Results so far; an empty list for a variant without any."""
    results = json.loads(path.read_text(encoding="utf-8"))["variants"] if path.is_file() else {}
    return {name: list(results.get(name, [])) for name in VARIANTS}


def _write(path: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    content = {
        "variants": results,
        "descriptions": {name: (variant.__doc__ or "").strip() for name, variant in VARIANTS.items()},
        "size": dataclasses.asdict(ABLATION),
        "versions": installed_versions(),
        "commit": project_commit(),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def print_table(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Mean and spread over seeds, BLEU-4 on both held-out splits."""
    from rich.table import Table

    from shards.terminal import table_console

    table = Table(title="Ablations on the synthetic corpus: BLEU-4, mean (min to max) over seeds")
    for column in ("variant", "seeds", "unseen sentences", "unseen signer too"):
        table.add_column(column)
    for name, results in rows.items():
        cells = []
        for split in ("test", "test_signer"):
            values = [float(row[split]["bleu4"]) for row in results]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "")
        table.add_row(name, str(len(results)), *cells)
    table_console().print(table)
