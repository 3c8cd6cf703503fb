"""The repository's own Python files, parsed once, for the tests that hold the code to its rules."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("shards", "pipeline", "launch")
EVERYTHING = (*LIBRARY, "tests", "benchmarks")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file: ``path`` relative to the repository, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Dotted module name (``pipeline.config.schema``)."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def functions(self) -> Iterator[FunctionNode]:
        for node in ast.walk(self.tree):
            if isinstance(node, FunctionNode):
                yield node


@functools.cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Every Python file below the given top-level folders, by path."""
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return tuple(_parse(file) for file in files if "__pycache__" not in file.parts)


@functools.cache
def _parse(file: Path) -> Source:
    text = file.read_text(encoding="utf-8")
    return Source(file.relative_to(ROOT).as_posix(), text, ast.parse(text, filename=str(file)))


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute chain, '' for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imported_modules(source: Source) -> Iterator[tuple[int, str]]:
    """(line, module) of every import anywhere in the file; ``from a import b`` gives both ``a`` and ``a.b``."""
    package = source.module if source.path.endswith("__init__.py") else source.module.rpartition(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([base] if base else []))
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(module: str, *packages: str) -> bool:
    """Whether ``module`` is one of ``packages`` or lies inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)
