"""The fault table of docs/resume-and-failures.md and the drills say the same."""

from __future__ import annotations

import re

from tests.multinode.drills import DRILLS
from tests.source_tree import ROOT


def test_every_drill_has_its_row_and_every_row_that_names_one_has_its_drill() -> None:
    page = (ROOT / "docs" / "resume-and-failures.md").read_text(encoding="utf-8")
    table = page.partition("## What can go wrong")[2].partition("\n\n")[0]
    rows = [tuple(map(str.strip, line.strip("|").split(" | "))) for line in table.splitlines() if " | " in line][2:]
    said = {drill: (event, re.match(r"\d+", code)) for event, _, code, drill in rows if drill}
    assert {name: (event, int(code[0]) if code else None) for name, (event, code) in said.items()} == {
        drill.name: (drill.event, drill.code_of_event) for drill in DRILLS
    }
