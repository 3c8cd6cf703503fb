"""Tables in files and pipes keep every column."""

from __future__ import annotations

import ast

import pytest
from rich.table import Table

from shards.terminal import table_console
from tests.source_tree import LIBRARY, dotted, sources


def test_no_column_is_lost_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = Table(*(f"column_{number}" for number in range(30)))
    table.add_row(*(f"value-{number:020d}" for number in range(30)))
    table_console().print(table)
    printed = capsys.readouterr().out
    assert all(f"column_{number}" in printed and f"value-{number:020d}" in printed for number in range(30))
    assert max(map(len, printed.splitlines())) < 1000  # as wide as the table, no wider


def test_every_table_of_the_library_is_printed_so() -> None:
    """A module that makes a rich table prints it to such a console."""
    problems = []
    for source in sources(*LIBRARY):
        calls = {dotted(node.func) for node in ast.walk(source.tree) if isinstance(node, ast.Call)}
        if "Table" in calls and "from rich.table import Table" in source.text and "table_console" not in calls:
            problems.append(source.path)
    assert not problems
