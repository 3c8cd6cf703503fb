"""The pages keep up with the code: links resolve; files, commands and recipe settings exist; every folder is named."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from launch.backends import BACKENDS
from pipeline.config.names import general_name, nearest_setting, setting_names
from pipeline.evaluate.protocols import PROTOCOLS
from tests.source_tree import ROOT, sources
from tests.unit.test_structure import IMPORT_RULES, SHARDS_FLOORS

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])
PACKAGES = ("shards", "pipeline", "launch", "ds_configs", "tests", "benchmarks", "docs")
FOLDERS = ("shards", "pipeline", "launch", "launch/recipes", "ds_configs", "tests", "benchmarks", "docs")


def _anchors_removed(target: str) -> str:
    return target.partition("#")[0]


def _code(page: Path) -> Iterator[str]:
    """Lines of code blocks and inline code of a page."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
        yield from re.sub(r"\\\n\s*", "", block).splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [_anchors_removed(t) for t in targets if "://" not in t and not t.startswith("#")]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"


@functools.cache
def _cli() -> Any:
    from launch.slt import app

    return typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    """`slt a b --option` in a page: the verbs and every option are real."""
    problems = [problem for line in _code(page) if line.startswith("slt ") for problem in _problems_of(line)]
    assert not problems, f"{page.name}:\n" + "\n".join(problems)


def _problems_of(line: str) -> Iterator[str]:
    words = shlex.split(line.partition("#")[0].replace("`", ""), posix=True)[1:]
    command = _cli()
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-") or words[0].isupper():
            return
        if words[0] not in command.commands:
            yield f"{line}: no command {words[0]!r}; there are {sorted(command.commands)}"
            return
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    if command.context_settings.get("ignore_unknown_options"):
        return
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in known:
            yield f"{line}: {word} is no option; there are {sorted(known)}"


def test_every_folder_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [folder for folder in FOLDERS if f"[`{folder}/`]" not in readme]


def test_the_readme_stays_short() -> None:
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words <= 900, f"README.md: {words} words, at most 900; figures belong in docs/benchmarks.md"


def test_every_page_is_reached_from_the_readme() -> None:
    linked = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES if page.parent == ROOT / "docs"]
    assert not [page for page in pages if f"({page})" not in linked]


def test_settings_named_in_the_pages_exist() -> None:
    """`data.unique_texts` and the like: a section name, a dot, and a field the recipe knows."""
    pattern = re.compile(
        r"(?:model|data|train|deepspeed|contrastive|connector|continued_pretraining|sequence_tuning)(?:\.[a-z0-9_]+)+"
    )
    problems = []
    for page in PAGES:
        for code in _code(page):
            if (
                pattern.fullmatch(code)
                and not code.endswith((".py", ".md", ".json", ".yaml"))
                and general_name(code) not in setting_names()
            ):
                problems.append(f"{page.name}: {code} is not a setting; nearest: {nearest_setting(code)}")
    assert not problems, "\n".join(problems)


def test_the_protocol_table_is_complete() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert not [name for name in PROTOCOLS if f"| `{name}` |" not in page]


def test_the_backend_table_is_exact() -> None:
    page = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    table = page.partition("## Backends")[2].partition("##")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == set(BACKENDS)


def test_files_and_modules_named_in_the_pages_exist() -> None:
    """`shards/order/plan.py`, `shards/order/plan.py:Plan`, `shards.order` and `shards.order.plan`; NAME is any name."""
    problems = []
    for page in PAGES:
        for code in re.findall(r"`([\w./:-]+)`", page.read_text(encoding="utf-8")):
            path, _, name = code.partition(":")
            if path.partition("/")[0] in PACKAGES and "/" in path and "NAME" not in path:
                problems += [f"{page.name}: {problem}" for problem in _problems_of_path(path, name)]
            elif code.partition(".")[0] in ("shards", "pipeline", "launch") and "." in code and code not in _modules():
                problems.append(f"{page.name}: there is no module {code}")
    assert not problems, "\n".join(problems)


def _problems_of_path(path: str, name: str) -> Iterator[str]:
    if not (ROOT / path).exists():
        yield f"there is no {path}"
    elif name and name not in _names(path):
        yield f"{path} has no {name} at its top level"


@functools.cache
def _modules() -> frozenset[str]:
    return frozenset(source.module for source in sources("shards", "pipeline", "launch"))


@functools.cache
def _names(path: str) -> frozenset[str]:
    """Functions, classes and constants at the top level of a file."""
    names: set[str] = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


def test_the_import_tables_of_the_architecture_page_are_those_the_tests_hold() -> None:
    """To correct the page, copy the lines this prints."""
    floors = [", ".join(floor) for floor in SHARDS_FLOORS]
    assert _block("floors") == floors, "docs/architecture.md, ```floors should be:\n" + "\n".join(floors)
    imports = [f"{module} -> {', '.join(allowed)}".rstrip() for module, allowed in IMPORT_RULES]
    assert _block("imports") == imports, "docs/architecture.md, ```imports should be:\n" + "\n".join(imports)


def _block(kind: str) -> list[str]:
    """Lines of the fenced block of that kind, without comments."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    text = page.partition(f"```{kind}\n")[2].partition("```")[0]
    return [line.partition("#")[0].rstrip() for line in text.splitlines()]
