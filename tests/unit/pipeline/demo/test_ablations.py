"""The ablation table: every variant once per seed, continued where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.demo import ablations
from pipeline.demo.ablations import VARIANTS, print_table, run_ablations
from pipeline.errors import RecipeError


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Variants that were run, with their seeds; none of them really is."""
    runs: list[tuple[str, int]] = []

    def variant(name: str) -> Any:
        def run(trial: ablations.Trial) -> Path:
            runs.append((name, trial.seed))
            return trial.out / name

        return run

    def score(export_dir: Path, data: object, split: str, out: Path) -> dict[str, float]:
        return {"bleu4": 30.0 if split == "test" else 20.0}

    monkeypatch.setattr(ablations, "VARIANTS", {name: variant(name) for name in VARIANTS})
    monkeypatch.setattr(ablations, "prepare", lambda *_: SimpleNamespace())
    monkeypatch.setattr(ablations, "evaluate_split", score)
    return runs


def test_the_table_shows_mean_and_spread(capsys: pytest.CaptureFixture[str]) -> None:
    def scores(seed: int, test: float, signer: float) -> dict[str, Any]:
        return {"seed": seed, "test": {"bleu4": test}, "test_signer": {"bleu4": signer}}

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    rows["full"] = [scores(0, 30.0, 20.0), scores(1, 36.0, 23.0), scores(2, 33.0, 20.0)]
    print_table(rows)
    text = capsys.readouterr().out
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert set(VARIANTS) <= set(lines)
    assert "33.0 (30.0 to 36.0)" in lines["full"] and "21.0 (20.0 to 23.0)" in lines["full"]
    assert lines["full"].split()[3] == "3" and "(" not in lines["frame_tokens"], "what has not run yet is empty"


def test_an_unknown_variant_is_refused_before_anything_runs(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    with pytest.raises(RecipeError, match=r"unknown ablation stage_9; there are full, without_stage_1, .*frame_tokens"):
        run_ablations(tmp_path / "out", 1, 1, ["full", "stage_9"])
    assert not trained and not (tmp_path / "out").exists()


def test_every_variant_runs_once_per_seed_and_an_interrupted_table_continues(
    tmp_path: Path, trained: list[tuple[str, int]]
) -> None:
    assert run_ablations(tmp_path, 1, 1, ["full", "frame_tokens"]) == 0
    assert trained == [("full", 0), ("frame_tokens", 0)]
    trained.clear()
    run_ablations(tmp_path, 2, 1, [])
    assert trained == [
        *((name, 0) for name in VARIANTS if name not in ("full", "frame_tokens")),
        *((name, 1) for name in VARIANTS),
    ]
    content = json.loads((tmp_path / "ablations.json").read_text())
    assert content["variants"]["full"] == [
        {"seed": seed, "test": {"bleu4": 30.0}, "test_signer": {"bleu4": 20.0}} for seed in (0, 1)
    ]
    assert content["descriptions"].keys() == VARIANTS.keys() and "torch" in content["versions"]
