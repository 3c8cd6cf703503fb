"""Every command of the page's table "Which machine do you have?" plans a launch; none starts one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import options
from launch.cli import app
from pipeline.config import preflight
from tests.source_tree import ROOT

SECTION = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8").partition("## Which machine")[2]
COMMANDS = re.findall(r"^\| [^|]+ \| `(slt launch [^`]+)`", SECTION.partition("\n## ")[0], flags=re.MULTILINE)
# a recipe for GPUs whose batch fits each of them
RECIPE = ["phoenix14t_contrastive_8xh100", "--set", "train.global_batch=1024", "--set", "train.micro_batch=1"]


def test_there_is_one_for_every_machine() -> None:
    assert len(COMMANDS) == 8


@pytest.mark.parametrize("command", COMMANDS)
def test_it_plans_a_launch(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("node-a slots=8\nnode-b slots=8\n")
    monkeypatch.setattr(options, "listed_devices", lambda: 8)
    monkeypatch.setattr(preflight, "problems_here", lambda recipe: iter(()))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    verb, recipe, *rest = shlex.split(command)[2:]
    assert recipe == "RECIPE"
    verb, extra = {"run": ("plan", ["--json"]), "submit": ("submit", ["--dry-run"])}.get(verb, (verb, []))
    done = CliRunner().invoke(app, [verb, *RECIPE, *rest, *extra])
    assert done.exit_code == 0, done.exception
    assert "phoenix14t_contrastive" in done.stdout, done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["hosts"], "nothing is written"
