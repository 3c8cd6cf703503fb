"""The card of an export: what it is, how it is loaded, where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.config.resolve import ResolvedRecipe
from pipeline.export.card import run_metrics, write_card
from tests.unit.pipeline.export.runs import finished_run, recipe_of

ROWS = [
    {"step": 0, "eval/perplexity": 90.0, "eval/tokens": 100},
    {"step": 4, "train/loss": 2.0},
    {"step": 5, "eval/perplexity": 12.3456},
    {"step": 9, "eval/perplexity": 1.0},
]


def write_metrics(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def test_metrics_are_those_of_the_exported_step(tmp_path: Path) -> None:
    checkpoint = finished_run(tmp_path, recipe_of("continued_pretraining"))
    assert run_metrics(tmp_path, checkpoint) == {}
    write_metrics(tmp_path)
    expected = {"eval/perplexity": 12.3456, "eval/tokens": 100}
    assert run_metrics(tmp_path, checkpoint) == expected
    assert run_metrics(checkpoint.path, checkpoint) == expected, "a checkpoint folder finds its run's metrics"


def test_everything_that_made_the_model_travels_with_it(tmp_path: Path) -> None:
    resolved = recipe_of("continued_pretraining", "seed=11")
    checkpoint = finished_run(tmp_path, resolved)
    write_metrics(tmp_path)
    out = tmp_path / "export"
    out.mkdir()
    write_card(out, checkpoint, resolved, tmp_path, {"logits": 1.5e-6})
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance == {
        "stage": "continued_pretraining", "step": 5, "seed": 11, "world_size": 2, "git_commit": resolved.git_commit,
        "versions": resolved.versions, "metrics": {"eval/perplexity": 12.3456, "eval/tokens": 100},
        "mean_of": [], "init_from": {}, "data_fingerprint": "f00d", "verified_against_live_model": {"logits": 1.5e-6},
    }  # fmt: skip
    assert ResolvedRecipe.from_yaml((out / "recipe.resolved.yaml").read_text()) == resolved
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["sign-language-translation", "llava-slt"],
    }  # fmt: skip
    assert f"# {resolved.recipe.name}" in card and "arXiv:2412.16524" in card
    assert "## Held-out metrics at step 5" in card and "| eval/perplexity | 12.35 |" in card
    assert f"Commit `{resolved.git_commit}`, seed 11, 2 ranks" in card
    assert "Compared with the live model at export: logits within 1.5e-06." in card


@pytest.mark.parametrize(
    ("stage", "tag", "loads"),
    [
        ("continued_pretraining", "text-generation", "AutoModelForCausalLM.from_pretrained"),
        ("contrastive", "feature-extraction", "HierarchicalVisualEncoder.from_pretrained"),
        ("connector", "video-text-to-text", "LlavaSltForConditionalGeneration.from_pretrained"),
    ],
)
def test_every_stage_says_how_it_is_loaded(tmp_path: Path, stage: str, tag: str, loads: str) -> None:
    resolved = recipe_of(stage)
    write_card(tmp_path, finished_run(tmp_path, resolved), resolved, tmp_path, {})
    card = (tmp_path / "README.md").read_text()
    assert f"pipeline_tag: {tag}" in card and loads in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code.replace("FOLDER", "'.'"), "card", "exec")
    imports = "\n".join(line for line in code.splitlines() if line.startswith("from "))
    exec(imports, {})  # the names exist
    assert "| none logged | |" in card and "Compared with the live model at export: not checked." in card
