"""`slt experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the `slt` application."""
    app.command(epilog="Example: slt experiment augmentation.yaml")(experiment)


def experiment(
    matrix: Annotated[Path, typer.Argument(help="YAML file: steps, axes, seeds, scores (docs/experiments.md)")],
    only: Annotated[str, typer.Option(help="only arms whose name contains this; the table shows all")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check every recipe and list what would be run")] = False,
) -> None:
    """Train every combination of settings with every seed, and compare them in one table.

    Runs what is missing through the launcher; steps that arms have in common
    are trained once. Stopped or failed, the same command goes on.
    """
    from pipeline.experiment.matrix import read_matrix
    from pipeline.experiment.run import run_trials
    from pipeline.experiment.steps import plan
    from pipeline.experiment.table import cells_of, columns, notes, table, write_reports
    from shards.terminal import table_console

    found = read_matrix(matrix)
    trials = plan(found)
    missing = {step.folder: step for trial in trials for step in trial.steps if not step.is_exported}
    typer.echo(f"{len(trials)} trials, {len(missing)} trainings to run below {found.out}")
    if dry_run:
        for step in missing.values():
            typer.echo(f"  {step.folder}: {step.recipe} {' '.join(step.sets)}")
        return
    failures = run_trials(found, [trial for trial in trials if only in trial.arm.name])
    rows = table(found, trials)
    paths = write_reports(found, rows, failures)
    from rich.table import Table

    shown = Table(title=found.name)
    for name in columns(found):
        shown.add_column(name)
    for row in rows:
        shown.add_row(*cells_of(found, row))
    console = table_console()
    console.print(shown)
    for note in notes(found, failures):
        console.print(note, highlight=False, soft_wrap=True)
    typer.echo(f"also in {', '.join(str(path) for path in paths)}")
    if failures:
        raise typer.Exit(1)
