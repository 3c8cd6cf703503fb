"""Which ``raise`` statements of the library the tests execute.

A test run with ``SLT_RAISES_MET=FOLDER`` imports the library with a note before every ``raise``; who comes by leaves an
empty file in FOLDER. Line coverage would tell the same, at 1.6 times the suite's processor time on Python
3.11; this costs nothing until something is raised. Processes that a test starts afresh are not watched.

``python -m tests.raises FOLDER`` lists the statements that nobody came by, and fails where
``MET_ELSEWHERE`` gives no reason.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib.machinery
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tests.source_tree import LIBRARY, ROOT, Source, dotted, sources

VARIABLE = "SLT_RAISES_MET"

MET_ELSEWHERE = {
    "launch/slt.py:train": "hands on the exit code of a rank: tests/multinode",
    "launch/slt.py:demo": "hands on the exit code of the demo: tests/end_to_end",
    "launch/slt.py:demo_ablations": "hands on an exit code; its parts are tested",
    "pipeline/engine/agreement.py:_check_bad_samples": "needs ranks: tests/multiproc/test_training.py",
    "pipeline/engine/agreement.py:_check_micro_batches": "needs ranks: tests/multiproc/test_agreement.py",
    "pipeline/stages/base.py:Stage.held_out": "needs ranks: tests/multiproc/test_training.py",
    "shards/build/engines.py:build_with_ray": "needs a cluster: tests/multiproc/test_build_ray.py",
    "shards/build/engines.py:_collect": "needs a cluster: tests/multiproc/test_build_ray.py",
    "shards/load/loader.py:_Stream.__next__": "the end of the requests, met here or there as fast as workers start",
}
"""``path:function`` -> why the unit tests need not come by."""

_NOTE = "__slt_raise_met__"


def watch(met: Path) -> None:
    """From now on, tell ``met`` of every ``raise`` that is executed in this process and in those it forks.

    Raises:
        RuntimeError: a module of the library is imported already, and so cannot be watched.
    """
    early = sorted({name.partition(".")[0] for name in sys.modules} & set(LIBRARY))
    if early:
        raise RuntimeError(f"imported before the watch began: {', '.join(early)}; begin it in the first conftest.py")
    met.mkdir(parents=True, exist_ok=True)
    setattr(builtins, _NOTE, _Notes(met.resolve()))
    sys.meta_path.insert(0, _Finder())


class _Notes:
    """One empty file per statement: that needs no space, no open file and no lock, which tests take away."""

    def __init__(self, met: Path) -> None:
        self.folder, self.seen, self.make = str(met), set[str](), os.mknod

    def __call__(self, place: str) -> None:
        if place not in self.seen:
            self.seen.add(place)
            with contextlib.suppress(FileExistsError):
                self.make(f"{self.folder}/{place.replace('/', '+')}")


def read(met: Path) -> set[str]:
    """``path:line`` of every statement that was executed."""
    return {name.replace("+", "/") for name in os.listdir(met)}


class _Finder:
    """Finds the library where Python does, and loads it with notes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in LIBRARY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def path_stats(self, path: str) -> Any:
        """None, so that no compiled file is read, and none with notes is left behind."""
        raise OSError("the code with notes is not kept")

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        tree = noted(ast.parse(data), Path(path).relative_to(ROOT).as_posix())
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)


def noted(tree: ast.Module, path: str) -> ast.Module:
    """The module with a call of the note before every ``raise``; lines stay as they are."""
    return ast.fix_missing_locations(_Noting(path).visit(tree))


class _Noting(ast.NodeTransformer):
    def __init__(self, path: str) -> None:
        self.path = path

    def visit_Raise(self, node: ast.Raise) -> list[ast.stmt]:
        place = ast.Constant(f"{self.path}:{node.lineno}")
        call = ast.Call(ast.Name(_NOTE, ast.Load()), [place], [])
        return [ast.copy_location(ast.Expr(call), node), node]


def raises(source: Source) -> Iterator[tuple[int, str]]:
    """(line, innermost function or method's class.name) of every ``raise``."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Raise) and not _of_an_invariant(child):
                yield child.lineno, name
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from visit(child, f"{name}.{child.name}".lstrip(".") if inner else name)

    yield from visit(source.tree, "")


def _of_an_invariant(node: ast.Raise) -> bool:
    """``raise AssertionError``, as ``assert``: no way leads there."""
    return isinstance(node.exc, ast.Call) and dotted(node.exc.func) == "AssertionError"


def problems(library: Iterable[Source], met: set[str], elsewhere: Iterable[str]) -> list[str]:
    """Statements nobody came by and no reason excuses."""
    missed = [
        (f"{source.path}:{line}", f"{source.path}:{function}")
        for source in library
        for line, function in raises(source)
        if f"{source.path}:{line}" not in met
    ]
    return [f"{place}: raised by no unit test ({key})" for place, key in missed if key not in set(elsewhere)]


def main(met: str) -> str | int:
    """Exit status: 0, or what is wrong."""
    library = sources(*LIBRARY)
    found = problems(library, read(Path(met)), MET_ELSEWHERE)
    total = sum(len(list(raises(source))) for source in library)
    sys.stdout.write(f"{total} raise statements, {len(found)} of them raised by no unit test\n")
    return "\n".join(found) if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
