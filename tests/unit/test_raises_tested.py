"""Every error a user can meet has a test that meets it.

Mechanical rule, for each ``raise SomeError(...)`` of the library: some test file

1. holds a string (a ``match=`` pattern, an ``in str(error)`` fragment) sharing a run of words with the message's
   static text, and belongs to the raising module (imports it, or names the error class), or
2. names the error class together with the raising function (for a private function: its class or a caller's public
   name does not count; give the message words instead).

A run is three consecutive words, two if one of them has five letters or more, or the whole fragment when it is shorter.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.source_tree import LIBRARY, Source, dotted, imported_modules, sources

# Ours and the ones Python's own protocols ask for; AttributeError is no user error.
EXEMPT = {"AttributeError", "StopIteration", "AssertionError"}
MIN_DISTINCTIVE_LETTERS = 5

UNTESTED_YET: frozenset[str] = frozenset()
"""`path:function:Error` entries that wait for their test; must end empty."""


@dataclass(frozen=True)
class Raise:
    path: str
    module: str
    line: int
    function: str
    """Innermost function (or class, for its ``__init__`` and validators)."""
    error: str
    runs: frozenset[tuple[str, ...]]
    """Runs of words by which a test can be recognised."""

    @property
    def id(self) -> str:
        return f"{self.path}:{self.function}:{self.error}"


def _words(text: str) -> list[str]:
    """Lower-case words; regular expression escapes and backslashes fall away."""
    return re.findall(r"[a-z0-9_]+", re.sub(r"\\[bBdDsSwWn]", " ", text).replace("\\", "").lower())


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _words(text)
    if len(words) == 1:
        return {(words[0],)} if len(words[0]) >= MIN_DISTINCTIVE_LETTERS else set()
    pairs = {pair for pair in itertools.pairwise(words) if max(map(len, pair)) >= MIN_DISTINCTIVE_LETTERS}
    triples = set(zip(words, words[1:], words[2:], strict=False))
    return pairs | triples | ({tuple(words)} if len(words) == 2 else set())


def _static_fragments(node: ast.AST) -> Iterator[str]:
    """String constants anywhere in the arguments, f-string parts separately."""
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


@functools.cache
def _helpers() -> dict[str, tuple[str, frozenset[tuple[str, ...]]]]:
    """Functions that build an error for their callers to raise: name -> (error, word runs of the common text)."""
    found = {}
    for source in sources(*LIBRARY):
        for function in source.functions():
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and _error_name(node.value):
                    found[function.name] = (_error_name(node.value), _call_runs(node.value))
    return found


def _error_name(call: ast.Call) -> str:
    name = dotted(call.func).rpartition(".")[2]
    return name if (name.endswith("Error") or name == "BadParameter") and name not in EXEMPT else ""


def _call_runs(call: ast.Call) -> frozenset[tuple[str, ...]]:
    return frozenset(run for fragment in _static_fragments(call) for run in _runs(fragment))


def _raises(source: Source) -> Iterator[Raise]:
    def visit(node: ast.AST, function: str) -> Iterator[Raise]:
        for child in ast.iter_child_nodes(node):
            name = function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = function if child.name.startswith("__") else child.name
            if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
                yield from _as_raise(source, child.exc, name)
            yield from visit(child, name)

    yield from visit(source.tree, "<module>")


def _as_raise(source: Source, call: ast.Call, function: str) -> Iterator[Raise]:
    error, runs = _error_name(call), _call_runs(call)
    if not error:
        error, common = _helpers().get(dotted(call.func).rpartition(".")[2], ("", frozenset()))
        runs = runs or common
    if error:
        yield Raise(source.path, source.module, call.lineno, function, error, runs)


@dataclass(frozen=True)
class ReadTest:
    names: frozenset[str]
    imports: frozenset[str]
    runs: frozenset[tuple[str, ...]]


@functools.cache
def _test_files() -> tuple[ReadTest, ...]:
    return tuple(_read_test(s) for s in sources("tests") if s.path.rpartition("/")[2] != "test_raises_tested.py")


def _read_test(source: Source) -> ReadTest:
    names, runs = set(), set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.name.rpartition(".")[2])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = _words(node.value)
            runs |= _runs(node.value) | set(itertools.pairwise(words))
            runs |= {(word,) for word in words if len(word) >= MIN_DISTINCTIVE_LETTERS}
    return ReadTest(frozenset(names), frozenset(module for _, module in imported_modules(source)), frozenset(runs))


def _is_tested(item: Raise) -> bool:
    for test in _test_files():
        if item.error in test.names and item.function in test.names:
            return True
        if item.runs & test.runs and (item.error in test.names or item.module in test.imports):
            return True
    return False


def test_every_reachable_error_has_a_test() -> None:
    raises = [item for source in sources(*LIBRARY) for item in _raises(source)]
    untested = [item for item in raises if not _is_tested(item) and item.id not in UNTESTED_YET]
    assert not untested, (
        "no test meets these errors; assert on the message's own words in a test of the raising module:\n"
        + "\n".join(f"{item.path}:{item.line}: {item.error} in {item.function}" for item in untested)
    )


def test_the_waiting_list_only_shrinks() -> None:
    waiting = {item.id for source in sources(*LIBRARY) for item in _raises(source) if not _is_tested(item)}
    stale = sorted(UNTESTED_YET - waiting)
    assert not stale, f"tested or gone: take these off UNTESTED_YET: {stale}"
