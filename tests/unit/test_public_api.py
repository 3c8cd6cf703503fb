"""What the pages tell users to import is there, lives in that module, and is described and typed."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

from tests.source_tree import LIBRARY, ROOT, within

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def _imported(page: Path) -> list[tuple[str, str]]:
    """(module, name) of every `from ours import name` in the page's Python blocks."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [
        (node.module or "", alias.name)
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and within(node.module or "", *LIBRARY)
        for alias in node.names
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if _imported(page)], ids=lambda page: page.name)
def test_imports_on_a_page_work(page: Path) -> None:
    """A name must live where the page imports it from, or be in ``__all__``: type checkers see no other."""
    problems = []
    for module_name, name in _imported(page):
        module = importlib.import_module(module_name)
        found = getattr(module, name, None)
        if found is None or (found.__module__ != module_name and name not in getattr(module, "__all__", ())):
            problems.append(f"{page.name}: from {module_name} import {name}")
    assert not problems, "\n".join(problems)


def test_public_names_are_described() -> None:
    public = [getattr(importlib.import_module(module), name) for module, name in _imported(ROOT / "docs/public-api.md")]
    assert len(public) > 40
    assert not [item.__qualname__ for item in public if not inspect.getdoc(item)]


def test_types_are_installed_with_the_packages() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in LIBRARY:
        assert (ROOT / package / "py.typed").is_file() and "py.typed" in data[package], package


def test_the_changelog_has_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", headings[1])
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
