"""`slt ckpt`: what a run has saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, inspect and convert checkpoints.", no_args_is_help=True)


@app.command("list", epilog="Example: slt ckpt list runs/demo/connector")
def ckpt_list(run_dir: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Complete checkpoints of a run."""
    from pipeline.engine.checkpoint import list_checkpoints

    for checkpoint in list_checkpoints(run_dir):
        size = sum(part["size"] for part in checkpoint.manifest["parts"].values())
        typer.echo(f"{checkpoint.path}  step {checkpoint.step}  {checkpoint.world_size} ranks  {size / 1e6:.1f} MB")


@app.command("inspect", epilog="Example: slt ckpt inspect runs/demo/connector/checkpoints/step-000100")
def ckpt_inspect(path: Annotated[Path, typer.Argument(help="checkpoint folder, or run folder for its latest")]) -> None:
    """Verify every part of a checkpoint and print its manifest and state as JSON."""
    import json

    from pipeline.export.hf import find_checkpoint

    checkpoint = find_checkpoint(path, "latest")
    shown = {"path": str(checkpoint.path), "manifest": checkpoint.manifest, "state": checkpoint.state().to_dict()}
    typer.echo(json.dumps(shown, indent=1))


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
