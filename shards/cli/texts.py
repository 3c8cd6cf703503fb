"""``slt shards`` verb that compares texts of finished shard sets: contamination."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shards.cli.common import Json, app, data_errors

if TYPE_CHECKING:
    from shards.filter.overlap import ContaminationReport


@app.command(epilog="Example: slt shards contamination data/ph14t --against data/how2sign --against extra.txt")
@data_errors
def contamination(
    train: Annotated[list[str], typer.Argument(help="shard sets whose train split is searched")],
    against: Annotated[
        list[str] | None, typer.Option(help="shard set or text file; default: the sets' own other splits")
    ] = None,
    against_text: Annotated[str, typer.Option(help="column of the text in the files of --against")] = "text",
    words: Annotated[int, typer.Option(min=1, help="words per n-gram")] = 8,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="part of an evaluation text's n-grams in one training text")
    ] = 0.8,
    out: Annotated[Path | None, typer.Option(help="also write the report as JSON to this file")] = None,
    as_json: Json = False,
) -> None:
    """Count the evaluation texts that occur in training texts: equal, or most of their n-grams inside one of them."""
    from shards.filter.corpus import contamination as run
    from shards.storage.store import open_folder

    report = run([open_folder(location) for location in train], against or [], words, overlap, against_text)
    if out is not None:
        from shards.atomic import write_atomic

        write_atomic(out, json.dumps(report.to_dict(), ensure_ascii=False, indent=1).encode() + b"\n")
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    _show(report)


def _show(report: ContaminationReport) -> None:
    from rich.table import Table

    from shards.terminal import table_console

    console = table_console()
    table = Table("evaluation texts", "number", "equal in train", "overlapping", "part", "too short to overlap")
    table.columns[0].overflow, table.columns[0].min_width = "fold", 32  # long paths differ at their ends
    for split in report.splits:
        part = (split.exact + split.near) / max(1, split.texts)
        figures = (split.texts, split.exact, split.near, f"{part:.1%}", split.short)
        table.add_row(split.name, *map(str, figures))
    console.print(table)
    console.print(
        f"{report.train_exact} of {report.train_texts} training texts equal an evaluation text, {report.train_near} "
        f"more hold {report.overlap:.0%} of the {report.words}-word n-grams of one"
    )
    for split in report.splits:
        for example in split.examples[:3]:
            how = "equal" if example.exact else f"{example.overlap:.0%}"
            console.print(f"{example.origin}: {example.text!r} ({how}) {example.train_origin}", markup=False)
