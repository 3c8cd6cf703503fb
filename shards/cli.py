"""``slt shards``: build, index, lint, stats, corpora. Also ``python -m shards.cli``."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.errors import DataError
from shards.progress import progress

app = typer.Typer(
    help="Pack corpora into shards, index, check and describe them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
logger = logging.getLogger(__name__)
_EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
Workers = Annotated[int, typer.Option(min=0, help="processes, 0 = all cores; the result is the same for any number")]


def _data_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """A DataError ends the verb with one paragraph on stderr and exit code 4."""

    @functools.wraps(verb)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except DataError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None

    return wrapped


@app.command(context_settings=_EXTRA, epilog="Example: slt shards build phoenix14t --root phoenix-v3 --out data/ph14t")
@_data_errors
def build(
    context: typer.Context,
    corpus: Annotated[str, typer.Argument(help="phoenix14t | table | text | synthetic; see `slt shards corpora`")],
    out: Annotated[Path, typer.Option(help="new folder for the shard set")],
    workers: Workers = 0,
    storage: Annotated[list[str], typer.Option("--store", help="how samples are stored: short_side=224")] = [],  # noqa: B006
    tokenizer: Annotated[str, typer.Option(help="Hugging Face tokenizer folder (text corpora)")] = "",
    max_skipped_fraction: Annotated[float, typer.Option(min=0, max=1, help="more skipped segments fail")] = 0.05,
) -> None:
    """Pack a corpus into WebDataset shards with an index and a manifest.

    Options of the corpus follow as `--key value` or `--option key=value`:
    `slt shards corpora NAME` lists them.

    Storage options are the fields of VideoOptions and BuildOptions.

    The result has the same bytes for any number of workers; a killed build
    continues where it stopped.
    """
    from shards.build import build as run
    from shards.corpora import make_corpus

    source = make_corpus(corpus, _extra(context.args))
    settings = _build_options(_pairs(storage, "--store"), tokenizer, max_skipped_fraction)
    with progress(f"build {out.name}") as show:
        manifest = run(
            source,
            out,
            settings,
            workers or _cores(),
            lambda state: show(state.done, state.total, f"{state.shard} skipped {state.skipped}"),
        )
    counts = ", ".join(f"{name} {number}" for name, number in manifest.counts.items())
    shards = f"{len(manifest.shards)} shards, fingerprint {manifest.fingerprint[:12]}"
    typer.echo(f"{out}: {shards}, {manifest.splits}, {counts}")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _pairs(values: list[str], flag: str) -> dict[str, str]:
    broken = [value for value in values if "=" not in value]
    if broken:
        raise DataError(f"{broken[0]!r} is not key=value", where=flag, fix=f"write {flag} key=value")
    return dict(value.split("=", 1) for value in values)


def _extra(arguments: list[str]) -> dict[str, str]:
    """``--media-root M --dev-fraction=0.1 --option signers=3`` as corpus options."""
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not (equals or rest):
            raise DataError(f"cannot read {flag!r}", where="corpus options", fix="write --key value")
        value = value if equals else rest.pop(0)
        found |= _pairs([value], "--option") if name == "option" else {name.replace("-", "_"): value}
    return found


def _build_options(stored: dict[str, str], tokenizer: str, max_skipped_fraction: float) -> Any:
    """BuildOptions from ``--store`` pairs; video fields and build fields share one name space."""
    import typing

    from shards.build import BuildOptions
    from shards.corpora import convert
    from shards.video import VideoOptions

    video_hints, build_hints = typing.get_type_hints(VideoOptions), typing.get_type_hints(BuildOptions)
    known = sorted({*video_hints, *build_hints} - {"video", "tokenizer", "max_skipped_fraction"})
    for key in stored:
        if key not in known:
            raise DataError(f"unknown option {key!r}", where="--store", fix=f"known: {', '.join(known)}")
    hints = build_hints | video_hints
    values = {key: convert(value, hints[key], f"--store {key}") for key, value in stored.items()}
    video = VideoOptions(**{key: value for key, value in values.items() if key in video_hints})
    rest = {key: value for key, value in values.items() if key not in video_hints}
    return BuildOptions(video=video, tokenizer=tokenizer, max_skipped_fraction=max_skipped_fraction, **rest)


@app.command(context_settings=_EXTRA, epilog="Example: slt shards corpora phoenix14t --root phoenix-v3")
@_data_errors
def corpora(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="corpus; without it all are listed")] = "",
) -> None:
    """List the known corpora, or the options of one; with options, count its segments without building anything."""
    from shards.corpora import REGISTRY, make_corpus

    if not name:
        typer.echo("\n".join(sorted(REGISTRY)))
    elif not context.args:
        _describe(name)
    else:
        from shards.stats import segment_counts

        for split, counts in segment_counts(make_corpus(name, _extra(context.args))).items():
            typer.echo(f"{split}: " + ", ".join(f"{key} {number}" for key, number in counts.items()))


def _describe(name: str) -> None:
    """Print what a corpus is and its options."""
    import inspect

    from shards.corpora import corpus_class

    cls = corpus_class(name)
    typer.echo(f"{name}: {inspect.getdoc(inspect.getmodule(cls))}\n\nOptions:")
    for key, parameter in inspect.signature(cls).parameters.items():
        default = "required" if parameter.default is parameter.empty else f"default {parameter.default!r}"
        default = "optional" if "factory" in default else default
        typer.echo(f"  --{key.replace('_', '-')}  {parameter.annotation}, {default}")


@app.command(epilog="Example: slt shards index data/ph14t/train-000000.tar --json")
@_data_errors
def index(
    path: Annotated[Path, typer.Argument(help="folder of tars: index it; one .tar: list its members")],
    corpus: Annotated[str, typer.Option(help="corpus name for samples whose json has none")] = "",
    as_json: Json = False,
) -> None:
    """Index WebDataset tars made elsewhere, or list the members of one tar with offsets and checksums."""
    if path.is_file():
        from shards.tar import index_tar

        members = [dataclasses.asdict(member) for member in index_tar(path)]
        lines = [f"{m['offset']:>12} {m['size']:>10} {m['crc32']:08x} {m['name']}" for m in members]
        typer.echo(json.dumps(members) if as_json else "\n".join(lines))
        return
    from shards.adopt import adopt

    with progress(f"index {path.name}") as show:
        manifest = adopt(path, corpus, lambda done, total: show(done, total, ""))
    typer.echo(
        json.dumps(manifest.to_dict()) if as_json else f"{path}: {len(manifest.shards)} shards, {manifest.splits}"
    )


@app.command(epilog="Example: slt shards lint data/ph14t --workers 8")
@_data_errors
def lint(
    folder: Annotated[Path, typer.Argument(help="shard set")],
    decode: Annotated[bool, typer.Option(help="decode every video and count its frames")] = True,
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Check every byte, checksum, annotation and video of a shard set; exit code 4 when there are problems."""
    from shards.lint import lint as run

    with progress(f"lint {folder.name}") as show:
        report = run(folder, decode, workers or _cores(), lambda done, total: show(done, total, ""))
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        for problem in report.problems:
            typer.echo(str(problem))
        size = f"{report.frames} frames" if report.frames else f"{report.tokens} tokens"
        verdict = "ok" if report.ok else f"{len(report.problems)} problems"
        typer.echo(
            f"{folder}: {verdict}; {report.shards} shards, {report.samples} samples, {size}, {report.seconds:.1f} s"
        )
    if not report.ok:
        raise typer.Exit(DataError.exit_code)


@app.command(epilog="Example: slt shards stats data/ph14t")
@_data_errors
def stats(folder: Annotated[Path, typer.Argument(help="shard set")], as_json: Json = False) -> None:
    """Samples, hours, lengths, vocabulary and split overlap of a shard set."""
    from shards.stats import stats as run

    figures = run(folder)
    if as_json:
        typer.echo(json.dumps(figures))
        return
    from rich.console import Console
    from rich.table import Table

    unit = "frames" if figures["kind"] == "video" else "tokens"
    names = ("split", "corpus", "samples", "hours", unit, "p50/p95/max", "words", "vocabulary", "signers")
    table = Table(*names, title=f"{folder} ({figures['shards']} shards, {figures['bytes'] / 1e6:.1f} MB)")
    for row in figures["groups"]:
        length = "/".join(f"{row['length'][key]:.0f}" for key in ("p50", "p95", "max"))
        values = [row[name] for name in names[:5]] + [length, row["words"]["mean"], row["vocabulary"], row["signers"]]
        table.add_row(*map(str, values))
    console = Console()
    console.print(table)
    for split, number in figures["texts_shared_with_train"].items():
        console.print(f"{split}: {number} samples have a text that also occurs in train")


if __name__ == "__main__":
    app()
