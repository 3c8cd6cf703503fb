"""The watch on ``raise`` statements, and that tests read the messages of our errors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import raises
from tests.source_tree import LIBRARY, ROOT, Source, dotted, sources
from tests.unit.test_structure import assert_none

CODE = """
def outer(value):
    if value:
        raise ValueError("yes")

    class Inner:
        def method(self):
            raise KeyError(value)

    try:
        Inner().method()
    except KeyError:
        raise
"""


def _source(text: str = CODE) -> Source:
    return Source("shards/example.py", text, ast.parse(text))


def test_every_raise_is_noted_once_and_lines_stay() -> None:
    notes: list[str] = []
    space: dict[str, object] = {"__slt_raise_met__": notes.append}
    exec(compile(raises.noted(ast.parse(CODE), "shards/example.py"), "example.py", "exec"), space)
    with pytest.raises(KeyError) as found:
        space["outer"](0)  # type: ignore[operator]
    assert [entry.lineno + 1 for entry in found.traceback[1:]] == [11, 8]
    assert notes == ["shards/example.py:8", "shards/example.py:13"]


def test_what_nobody_raised_is_told_with_its_place() -> None:
    met = {"shards/example.py:8", "shards/example.py:13"}
    untested = "shards/example.py:4: raised by no unit test (shards/example.py:outer)"
    assert raises.problems([_source()], met, ()) == [untested]
    assert raises.problems([_source()], met, ["shards/example.py:outer"]) == []
    assert raises.problems([_source()], met - {"shards/example.py:8"}, ()) == [
        untested,
        "shards/example.py:8: raised by no unit test (shards/example.py:outer.Inner.method)",
    ]


def test_invariants_need_no_test() -> None:
    assert list(raises.raises(_source("def f():\n    raise AssertionError('never')"))) == []


def test_a_watched_process_leaves_where_it_raised(tmp_path: Path) -> None:
    """In a process of its own: in this one the library is imported."""
    met = tmp_path / "new" / "met"
    program = (
        f"from pathlib import Path; from tests import raises; raises.watch(Path({str(met)!r}))\n"
        "from launch.backends import get_backend\n"
        "for _ in range(2):\n"
        "    try: get_backend('nothing')\n"
        "    except Exception as error: print(error)\n"
        "try: raises.watch(Path('other'))\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--backend nothing is unknown" in done.stdout
    assert "imported before the watch began: launch" in done.stdout
    source = next(s for s in sources("launch") if s.path == "launch/backends/__init__.py")
    line = next(line for line, function in raises.raises(source) if function == "get_backend")
    assert raises.read(met) == {f"launch/backends/__init__.py:{line}"}


def test_reasons_name_functions_that_raise() -> None:
    """Also without a watched run: a function that moved takes its reason along."""
    known = {f"{source.path}:{function}" for source in sources(*LIBRARY) for _, function in raises.raises(source)}
    assert_none(sorted(set(raises.MET_ELSEWHERE) - known))


def test_tests_read_the_messages_of_our_errors() -> None:
    """``pytest.raises(DataError)`` alone is content with any of them: give ``match=``, or look at what was caught."""
    ours = {
        node.name
        for source in sources(*LIBRARY)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    assert {"DataError", "RecipeError", "StoreError"} <= ours
    assert_none(
        [
            f"{source.path}:{item.context_expr.lineno}: {ast.unparse(item.context_expr)} reads no message"
            for source in sources("tests")
            for node in ast.walk(source.tree)
            if isinstance(node, ast.With)
            for item in node.items
            if item.optional_vars is None and _raises_unread(item.context_expr, ours)
        ]
    )


def _raises_unread(node: ast.expr, ours: set[str]) -> bool:
    """Whether this is ``pytest.raises`` of one of our errors, and of no message."""
    if not isinstance(node, ast.Call) or dotted(node.func) != "pytest.raises" or not node.args:
        return False
    caught = {child.id for child in ast.walk(node.args[0]) if isinstance(child, ast.Name)}
    return caught <= ours and not any(keyword.arg == "match" for keyword in node.keywords)
