from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.config.cli import app, run_app
from pipeline.errors import RecipeError
from tests.light_start import MODELS, output_of_light_start
from tests.unit.pipeline.config.recipes import CONNECTOR, write

runner = CliRunner()


def test_check_reports_the_batch_arithmetic(tmp_path: Path) -> None:
    path = write(tmp_path, CONNECTOR)
    result = runner.invoke(app, ["check", str(path), "--settings-only", "--json", "--set", "train.world_sizes=[2, 4]"])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["world_sizes"]
    assert [(row["world_size"], row["accumulation_steps"]) for row in rows] == [(2, 2), (4, 1)]
    assert (
        "accumulation_steps" in runner.invoke(app, ["check", str(path), "--settings-only", "--world-size", "1"]).stdout
    )


def test_check_raises_all_problems(tmp_path: Path) -> None:
    result = runner.invoke(app, ["check", str(write(tmp_path, CONNECTOR)), "--world-size", "3"])
    assert isinstance(result.exception, RecipeError) and "= 6; 6 or 12 would be" in str(result.exception)


def test_show_names_origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, CONNECTOR)
    result = runner.invoke(app, ["show", "recipe.yaml", "--set", "seed=3"])
    lines = {line.split("#")[0].strip(): line.rpartition("# ")[2] for line in result.stdout.splitlines()}
    assert lines["seed: 3"] == "--set seed=3"
    assert lines["global_batch: 8"] == "recipe.yaml:14"
    assert lines["weight_decay: 0.01"] == "default"
    assert lines["- shards: shards/video"] == "recipe.yaml:11"
    assert "accumulation_steps: 4" in lines
    data = json.loads(runner.invoke(app, ["show", "recipe.yaml", "--json"]).stdout)
    assert data["origins"]["train.steps"] == "recipe.yaml:13" and data["resolved"]["ds_config"]["train_batch_size"] == 8


def test_show_of_many_lines_keeps_comments_on_their_values(tmp_path: Path) -> None:
    text = CONNECTOR + 'connector: {prompt: "{video}\\nSay it.\\n"}\n'
    out = runner.invoke(app, ["show", str(write(tmp_path, text))]).stdout
    assert next(line for line in out.splitlines() if "max_new_tokens" in line).endswith("# default")


def test_values_are_shown_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, CONNECTOR.replace("name: tiny", "name: '[b] :car:'"))
    assert "name: '[b] :car:'" in runner.invoke(app, ["show", str(path)]).stdout
    assert "[b] :car: (connector)" in runner.invoke(app, ["check", str(path), "--settings-only"]).stdout
    assert "[b] :car:" in runner.invoke(app, ["diff", str(path), str(write(tmp_path, CONNECTOR, "b.yaml"))]).stdout


def test_diff(tmp_path: Path) -> None:
    a, b = write(tmp_path, CONNECTOR, "a.yaml"), write(tmp_path, CONNECTOR.replace("1e-3", "2e-3"), "b.yaml")
    result = runner.invoke(app, ["diff", str(a), str(b), "--json"])
    assert json.loads(result.stdout) == {"train.optimizer.lr": {"a": 1e-3, "b": 2e-3}}
    assert "no differences" in runner.invoke(app, ["diff", str(a), str(a)]).stdout
    assert "train.optimizer.lr" in runner.invoke(app, ["diff", str(a), str(b)]).stdout


def test_errors_become_one_paragraph_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_app(app, ["check", str(tmp_path / "missing.yaml")])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert "neither a recipe file nor a built-in recipe" in captured.err and "Traceback" not in captured.err


def test_starts_without_torch() -> None:
    shown = output_of_light_start(
        "pipeline.config.cli", ["check", "demo_connector", "--settings-only"], (*MODELS, "numpy", "pyarrow")
    )
    assert "demo_connector (connector)" in shown
