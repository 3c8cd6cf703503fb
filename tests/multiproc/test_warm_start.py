"""A run that starts from an export begins where its source ended, and goes on from checkpoints like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.export.hf import export
from tests.jobs import World, rows, run_job
from tests.multiproc.test_loaded_ranks import save_llm
from tests.multiproc.test_training import newest, weights

pytestmark = pytest.mark.multiproc

SETTINGS = {
    "train__steps": 2, "train__checkpoint__every_steps": 1, "train__checkpoint__keep": 3, "train__optimizer__lr": 0.01,
}  # fmt: skip


def scores(run_dir: Path, step: int) -> dict[str, float]:
    """Every held-out metric of a step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {n: v for row in lines if row["step"] == step for n, v in row.items() if n.startswith("eval/")}


def test_contrastive_pretraining_goes_on_with_its_heads(world: World, tmp_path: Path) -> None:
    """Both ways to name the encoder: the model's weights, or its folder, beside the heads."""
    sets = world.sets("contrastive", tmp_path / "source", 2, **SETTINGS)
    run_job("contrastive", sets, 2)
    out = tmp_path / "export"
    export(tmp_path / "source", out)
    once = {**SETTINGS, "train__steps": 1}
    whole = world.sets("contrastive", tmp_path / "whole", 2, **once, model__init_from__model=out)
    assert f"model.init_from: heads: 10 tensors of {out}" in run_job("contrastive", whole, 2)
    by_part = world.sets("contrastive", tmp_path / "parts", 1, **once)
    by_part += [f"model.visual={{path: {out}}}", f"model.init_from.heads={out}"]
    run_job("contrastive", by_part, 1)
    last = scores(tmp_path / "source", 2)
    assert last != scores(tmp_path / "source", 0)
    assert scores(tmp_path / "whole", 0) == last and scores(tmp_path / "parts", 0) == pytest.approx(last, rel=1e-4)
    plan = newest(tmp_path / "whole").export_plan()
    assert plan["initial"].keys() == {"visual", "heads"}
    assert plan["initial"]["heads"]["heads.safetensors"]["size"] == (out / "heads.safetensors").stat().st_size


def test_a_translator_goes_on_with_all_that_it_has_learned(world: World, tmp_path: Path) -> None:
    """Frozen parts, which no checkpoint holds, come from the export, too: at the start, on resume and on export."""
    run_job("connector", world.sets("connector", tmp_path / "source", 2, **SETTINGS), 2)
    out = tmp_path / "export"
    export(tmp_path / "source", out)
    save_llm(tmp_path / "llm", world.tokenizer)  # what the recipe would begin with otherwise
    values = {**SETTINGS, "model__llm__path": tmp_path / "llm", "model__init_from__model": out}
    sets = world.sets("connector", tmp_path / "run", 2, **values)
    run_job("connector", sets, 2)
    assert scores(tmp_path / "run", 0) == scores(tmp_path / "source", 2)
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000002")
    output = run_job("connector", world.sets("connector", tmp_path / "resumed", 2, **values), 2)
    assert "step-000001 at step 1" in output and "model.init_from: llm: " in output
    assert "model.init_from: connector" not in output, "the checkpoint holds it"
    assert rows(tmp_path / "resumed") == rows(tmp_path / "run")
    assert weights(tmp_path / "resumed") == weights(tmp_path / "run")
    plans = [newest(tmp_path / name).export_plan() for name in ("run", "resumed")]
    assert plans[0] == plans[1] and plans[0]["sources"].keys() == {"llm", "visual"}
    assert plans[0]["initial"].keys() == {"llm", "visual", "connector"}
    assert max(export(tmp_path / "resumed", tmp_path / "again").values()) < 1e-4
