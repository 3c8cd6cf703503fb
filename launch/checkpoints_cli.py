"""`slt ckpt`: what a run has saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, inspect, verify and convert checkpoints.", no_args_is_help=True)


@app.command("list", epilog="Example: slt ckpt list runs/demo/connector")
def ckpt_list(run_dir: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Checkpoints of a run, the best one marked; damaged and foreign ones by name."""
    from pipeline.engine.listing import listing

    lines = listing(run_dir)
    for line in lines:
        typer.echo(line)
    if not lines:
        typer.echo(f"{run_dir} holds no checkpoint; if it should, check the path", err=True)


@app.command("inspect", epilog="Example: slt ckpt inspect runs/demo/connector/checkpoints/step-000100")
def ckpt_inspect(path: Annotated[Path, typer.Argument(help="checkpoint folder, or run folder for its latest")]) -> None:
    """Verify every part of a checkpoint and print its manifest and state as JSON.

    Of a checkpoint of another format version only the manifest is shown.
    """
    import json

    from pipeline.engine.checkpoint import is_foreign
    from pipeline.export.hf import find_checkpoint

    if (path / "COMPLETE").is_file() and is_foreign(path):
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        typer.echo(json.dumps({"path": str(path), "manifest": manifest}, indent=1))
        typer.echo(f"{path} is of another format version: shown, not verified", err=True)
        return
    checkpoint = find_checkpoint(path, "latest")
    shown = {"path": str(checkpoint.path), "manifest": checkpoint.manifest, "state": checkpoint.state().to_dict()}
    typer.echo(json.dumps(shown, indent=1))


@app.command("verify", epilog="Example: slt ckpt verify runs/demo/connector")
def ckpt_verify(path: Annotated[Path, typer.Argument(help="checkpoint folder, or run folder for all of its")]) -> None:
    """Read every byte of one or all checkpoints; exit code 6 if a file is damaged."""
    from pipeline.engine.listing import verified
    from pipeline.errors import DamagedCheckpointError

    lines, problems = verified(path)
    for line in lines:
        typer.echo(line)
    if problems:
        raise DamagedCheckpointError(
            f"{path} is damaged:\n  " + "\n  ".join(problems)
            + "\n  fix: restore these files from a copy; a run that resumes uses the newest intact checkpoint"
        )  # fmt: skip


@app.command("average", epilog="Example: slt ckpt average runs/demo/connector --last 5")
def ckpt_average(
    run_dir: Annotated[Path, typer.Argument(help="run folder")],
    last: Annotated[int, typer.Option(min=2, help="how many of its newest complete checkpoints")],
    out: Annotated[Path | None, typer.Option(help="new folder; default: beside the checkpoints")] = None,
) -> None:
    """Average the weights of a run's last checkpoints into one that `slt export --no-verify` reads."""
    from pipeline.engine.saving.mean import mean_of_last

    typer.echo(str(mean_of_last(run_dir, last, out)))


@app.command("reshard", epilog="Example: slt ckpt reshard runs/demo/connector/checkpoints/step-000100 --out universal")
def ckpt_reshard(
    path: Annotated[Path, typer.Argument(help="checkpoint folder, or run folder for its latest")],
    out: Annotated[Path | None, typer.Option(help="new folder; default: hidden, beside the checkpoint")] = None,
) -> None:
    """Copy a checkpoint into DeepSpeed's universal format, for other programs on DeepSpeed.

    `slt launch run` and `slt train` need no copy: they resume from the
    checkpoint at any world size and ZeRO stage.
    """
    from pipeline.engine.reshard import to_universal
    from pipeline.export.hf import find_checkpoint

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done / total:4.0%} of {total:,} numbers" + ("\n" if done == total else ""))

    typer.echo(str(to_universal(find_checkpoint(path, "latest"), out, show)))
