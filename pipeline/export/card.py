"""Model card and provenance of an export: seeds, versions, recipe, commit and measured metrics travel with it."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.checkpoint import Checkpoint
from pipeline.engine.metrics import read_metrics
from pipeline.stages.registry import stage_class


def run_metrics(source: Path, checkpoint: Checkpoint) -> dict[str, float]:
    """The last value of each held-out metric that the run logged up to the exported step; of a mean of checkpoints it
    has logged none."""
    if checkpoint.mean_of:
        return {}
    run_dir = source if (source / "metrics.jsonl").is_file() else checkpoint.path.parent.parent
    if not (run_dir / "metrics.jsonl").is_file():
        return {}
    rows = [row for row in read_metrics(run_dir) if row["step"] <= checkpoint.step]
    return {name: value for row in rows for name, value in row.items() if name.startswith("eval/")}


def write_card(
    folder: Path, checkpoint: Checkpoint, resolved: ResolvedRecipe, source: Path, differences: dict[str, float]
) -> None:
    """README.md, recipe.resolved.yaml and provenance.json into ``folder``."""
    stage = resolved.recipe.stage
    card = stage_class(stage).card
    metrics = run_metrics(source, checkpoint)
    provenance = {
        "stage": stage, "step": checkpoint.step, "seed": resolved.recipe.seed, "world_size": checkpoint.world_size,
        "git_commit": resolved.git_commit, "versions": resolved.versions, "metrics": metrics,
        "mean_of": checkpoint.mean_of, "init_from": checkpoint.export_plan().get("initial", {}),
        "data_fingerprint": checkpoint.state().data["fingerprint"], "verified_against_live_model": differences,
    }  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1), encoding="utf-8")
    (folder / "recipe.resolved.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())) or "| none logged | |"
    checked = ", ".join(f"{name} within {value:.2g}" for name, value in differences.items()) or "not checked"
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\npipeline_tag: {card.pipeline_tag}\n"
        "tags: [sign-language-translation, llava-slt]\n---\n\n"
        f"# {resolved.recipe.name}\n\n{card.what} Trained with llava-slt after arXiv:2412.16524.\n\n"
        f"```python\n{card.load}\n```\n\n"
        f"## Held-out metrics at step {checkpoint.step}\n\n| metric | value |\n| --- | --- |\n{rows}\n\n"
        f"## Provenance\n\nCommit `{resolved.git_commit}`, seed {resolved.recipe.seed}, {checkpoint.world_size} "
        "ranks. Recipe: `recipe.resolved.yaml`; versions and data fingerprint: `provenance.json`.\n"
        f"Compared with the live model at export: {checked}.\n",
        encoding="utf-8",
    )
