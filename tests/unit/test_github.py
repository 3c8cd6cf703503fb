"""What GitHub runs and asks for: the files parse, and they name what is really there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.recipe_file import RESOLVED_RECIPE
from tests.source_tree import ROOT

FORMS = sorted(file for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml")
FIELDS = {"textarea", "input", "dropdown", "checkboxes"}


def _read(file: Path) -> Any:
    """A YAML file, every plain scalar as a string: ``on`` stays a word."""
    return yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def test_the_workflow_runs_what_anybody_can_run() -> None:
    workflow = _read(ROOT / ".github" / "workflows" / "ci.yml")
    assert set(workflow["on"]) == {"push", "pull_request"}
    job = workflow["jobs"]["test"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, "git must keep .ci/run executable"
    floor = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert floor is not None and floor[1] in job["strategy"]["matrix"]["python"]
    cached = next(step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert cached["cache"] == "pip"
    assert all((ROOT / file).is_file() for file in cached["cache-dependency-path"].split())


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.name)
def test_issue_forms_are_complete(file: Path) -> None:
    """The parts without which GitHub does not show a form."""
    form = _read(file)
    assert form["name"] and form["description"]
    fields = [part for part in form["body"] if part["type"] in FIELDS]
    assert len(fields) == len([part for part in form["body"] if part["type"] != "markdown"]) > 0
    assert all(part["attributes"]["label"] for part in fields)
    assert len({part["id"] for part in fields}) == len(fields)


def test_a_bug_report_asks_for_the_resolved_recipe() -> None:
    labels = [part["attributes"]["label"] for part in _read(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml")["body"]]
    assert RESOLVED_RECIPE in labels
