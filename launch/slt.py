"""The `slt` command: verbs import what they need when they run, so `slt --help` starts at once."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.checkpoints_cli import app as ckpt_app
from launch.cli import app as launch_app
from launch.environment import set_defaults
from pipeline.config.cli import app as recipe_app
from pipeline.errors import EXIT_BUG, EXIT_INTERRUPTED
from pipeline.evaluate.cli import register as register_evaluate
from pipeline.experiment.cli import register as register_experiment
from shards.cli.app import app as shards_app

app = typer.Typer(
    help="Distributed pretraining for sign language translation with large language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(shards_app, name="shards")
app.add_typer(recipe_app, name="recipe")
app.add_typer(launch_app, name="launch")
app.add_typer(ckpt_app, name="ckpt")
vocab_app = typer.Typer(help="The words of a language model and its tokenizer.", no_args_is_help=True)
app.add_typer(vocab_app, name="vocab")
register_evaluate(app)
register_experiment(app)


@shards_app.command(epilog="Example: slt shards features data/ph14t --recipe contrastive.yaml --out data/ph14t-dinov2")
def features(
    shards: Annotated[Path, typer.Argument(help="video shard set")],
    recipe: Annotated[Path, typer.Option(help="recipe whose frozen backbone and image size are used")],
    out: Annotated[Path, typer.Option(help="new folder for the feature set")],
    sets: Annotated[list[str], typer.Option("--set", help="override a field of the recipe")] = [],  # noqa: B006
    frame_stride: Annotated[int, typer.Option(min=1, help="store every n-th frame")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode")] = 1,
    views: Annotated[
        int, typer.Option(min=1, help="views per clip: as it is, and changed as the recipe's data.augment says")
    ] = 1,
) -> None:
    """Compute the features of a frozen backbone once and store them as shards.

    A recipe that names the result under `data.train` skips decoding and the
    backbone; what it exports still holds the backbone and translates videos.
    """
    from pipeline.inference.extract_features import extract
    from shards.build.features import FeatureOptions
    from shards.cli.progress import progress

    options = FeatureOptions(frame_stride, workers, views=views)
    with progress(f"features {out.name}") as show:
        manifest = extract(recipe, sets, shards, out, options, lambda done, total: show(done, total, ""))
    typer.echo(f"{out}: {manifest.counts['samples']} samples, {manifest.options['features']}")


@vocab_app.command(epilog="Example: slt vocab extend models/llm --words words.txt --out models/llm-more")
def extend(
    llm: Annotated[str, typer.Argument(help="Hugging Face folder or hub id of a causal language model")],
    words: Annotated[Path, typer.Option(help="text file, one word per line")],
    out: Annotated[Path, typer.Option(help="new folder for model and tokenizer")],
    spaces: Annotated[
        bool, typer.Option("--spaces/--no-spaces", help="whether the words' language separates words by spaces")
    ] = True,
) -> None:
    """Give a language model new words, each a single token whose rows start as the mean of its old pieces."""
    from pipeline.models.vocabulary import extend as run
    from pipeline.models.vocabulary import read_words

    for word, number in run(llm, read_words(words), out, spaces).items():
        typer.echo(f"{number}\t{word}")
    typer.echo(str(out))


@app.command(epilog="Example: slt train launch/recipes/demo_contrastive.yaml --set train.steps=20")
def train(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    sets: Annotated[list[str], typer.Option("--set", help="override a field: train.steps=100")] = [],  # noqa: B006
) -> None:
    """Run one rank of a stage in this process (`slt launch run` starts all of them)."""
    from launch.train import run_rank

    raise typer.Exit(run_rank(str(recipe), sets))


@app.command(epilog="Example: slt export runs/demo/connector --out runs/demo/connector/export")
def export(
    source: Annotated[Path, typer.Argument(help="run folder or checkpoint folder")],
    out: Annotated[Path | None, typer.Option(help="folder to write; default RUN/export")] = None,
    which: Annotated[str, typer.Option(help="best or latest checkpoint of a run folder")] = "best",
    verify: Annotated[bool, typer.Option(help="compare with the live model's stored outputs")] = True,
    max_shard_gib: Annotated[float, typer.Option(help="largest safetensors file, GiB")] = 4.0,
    lora: Annotated[
        Literal["merge", "keep"], typer.Option(help="add adapters to the weights they adapt, or keep them")
    ] = "merge",
) -> None:
    """Export a checkpoint to a Hugging Face folder and prove that it equals the live model.

    Tensors pass through memory one at a time; only the comparison loads the
    result. An export that was killed goes on where it was.
    """
    from pipeline.export.hf import export as run
    from shards.cli.progress import progress

    target = out or source / "export"
    with progress(f"export {target.name}") as show:
        differences = run(source, target, which, verify, int(max_shard_gib * 1024**3), lora, show)
    for name, value in differences.items():
        typer.echo(f"{name}: largest difference to the live model {value:.3g}")
    typer.echo(str(target))


@app.command(epilog="Example: slt demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(help="folder for data, runs and report")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="seed of data and training")] = 0,
    num_procs: Annotated[int, typer.Option(help="training processes")] = 2,
    gloss_free: Annotated[bool, typer.Option("--gloss-free", help="stage 1 never sees a gloss")] = False,
    size: Annotated[
        str,
        typer.Option(help="`full`, `ablation` (about half of it) or `smoke` (two minutes, no score floor)"),
    ] = "full",
) -> None:
    """All three stages on a synthetic sign corpus, from nothing to translated videos, on this machine."""
    from pipeline.demo.run import run_demo

    raise typer.Exit(run_demo(out, seed, num_procs, size, gloss_free))


@app.command("demo-ablations", epilog="Example: slt demo-ablations --out runs/ablations --seeds 3")
def demo_ablations(
    out: Annotated[Path, typer.Option(help="folder for data, runs and table")] = Path("runs/ablations"),
    seeds: Annotated[int, typer.Option(help="seeds per variant")] = 3,
    num_procs: Annotated[int, typer.Option(help="training processes")] = 2,
    variants: Annotated[list[str], typer.Option("--variant", help="only this one; repeatable")] = [],  # noqa: B006
) -> None:
    """What each stage is worth: the demo without stage 1, without stage 2, with frame tokens, several seeds each."""
    from pipeline.demo.ablations import run_ablations

    raise typer.Exit(run_ablations(out, seeds=seeds, num_procs=num_procs, variants=variants))


def main() -> None:
    """Entry point: a user error gives a paragraph and an exit code, never a traceback."""
    set_defaults()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for ours in ("shards", "pipeline", "launch"):  # INFO of other libraries is noise here, such as credential paths
        logging.getLogger(ours).setLevel(logging.INFO)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        code = getattr(error, "exit_code", EXIT_BUG)
        if code == EXIT_BUG:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(code)


if __name__ == "__main__":
    main()
