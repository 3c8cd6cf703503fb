"""``slt shards synth``: the synthetic sign corpus, with keypoints where they are wanted."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated

import typer

from shards.cli.build import typed_options
from shards.cli.common import Workers, app, cores, data_errors
from shards.cli.progress import progress


@app.command(epilog="Example: slt shards synth --out data/synthetic --poses --set train=300")
@data_errors
def synth(
    out: Annotated[Path, typer.Option(help="new folder for the corpus")],
    poses: Annotated[bool, typer.Option("--poses", help="write the keypoints of every frame, too")] = False,
    sets: Annotated[
        list[str], typer.Option("--set", help="train=1500, dev=100, test=150, seed=0, size=64, fps=12.5 ...; repeat")
    ] = [],  # noqa: B006
    workers: Workers = 0,
) -> None:
    """Generate the synthetic sign corpus that the demo and the experiments use.

    `slt shards build synthetic --root OUT` packs its videos; with --poses also
    `--rows 'OUT/poses/{media}.npy' --rows-are layout=synthetic --rows-are rate=12.5`.
    """
    from shards.corpora.synthetic import SyntheticOptions, generate

    hints = typing.get_type_hints(SyntheticOptions)
    values = typed_options(sets, "--set", {name: hint for name, hint in hints.items() if name != "poses"})
    options = SyntheticOptions(**values, poses=poses)
    with progress(f"synth {out.name}") as show:
        generate(out, options, workers or cores(), lambda done, total: show(done, total, ""))
    videos = options.train + options.dev + options.test + options.test_signer
    typer.echo(f"{out}: {videos} videos{' and poses' if poses else ''} of {options.size} pixels at {options.fps:g} fps")
