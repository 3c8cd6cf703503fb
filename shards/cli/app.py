"""``slt shards``: the verbs corpora and index; other modules hold the other verbs. Also ``python -m shards.cli``."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.cli import build, synth, texts, tools
from shards.cli.build import source_corpus
from shards.cli.common import CORPUS_OPTIONS, Filters, Json, app, data_errors, extra_options, print_notes
from shards.cli.progress import progress
from shards.errors import DataError
from shards.wording import listed

_WIDTH = 72
__all__ = ["app", "build", "synth", "texts", "tools"]  # importing a module of verbs registers them on `app`


@app.command(context_settings=CORPUS_OPTIONS, epilog="Example: slt shards corpora phoenix14t --root phoenix-v3")
@data_errors
def corpora(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="corpus; without it all are listed")] = "",
    filters: Filters = [],  # noqa: B006
    missing: Annotated[Path | None, typer.Option(help="folder for missing.txt and missing.jsonl")] = None,
    as_json: Json = False,
) -> None:
    """List the known corpora, or the options of one; with options, report on it.

    The report compares the number of segments with the publication and lists
    missing media. It builds nothing. Faults that would fail a build, such as
    an id that occurs twice, give exit code 4.
    """
    from shards.corpora import REGISTRY

    if not name:
        typer.echo(json.dumps(sorted(REGISTRY)) if as_json else "\n".join(sorted(REGISTRY)))
    elif not context.args:
        _describe(name)
    else:
        _report(source_corpus(name, extra_options(context.args), filters), missing, as_json)


def _report(corpus: Any, missing: Path | None, as_json: bool) -> None:
    from shards.build.report import corpus_report, report_lines, write_missing

    report = corpus_report(corpus)
    if missing is not None:
        write_missing(report, missing)
    typer.echo(json.dumps(report, ensure_ascii=False) if as_json else "\n".join(report_lines(report)))
    if report["faults"]:
        raise typer.Exit(DataError.exit_code)


def _describe(name: str) -> None:
    """Print the description of a corpus and its options."""
    import inspect

    from shards.corpora import corpus_class, option_meanings

    cls = corpus_class(name)
    meanings = option_meanings(cls)
    typer.echo(f"{name}: {inspect.getdoc(inspect.getmodule(cls))}\n\nOptions:")
    for key, parameter in inspect.signature(cls).parameters.items():
        default = "required" if parameter.default is parameter.empty else f"default {parameter.default!r}"
        default = "optional" if "factory" in default else default
        typer.echo(f"  --{key.replace('_', '-')}  {parameter.annotation}, {default}")
        for line in textwrap.wrap(meanings.get(key, ""), _WIDTH):
            typer.echo(f"      {line}")


@app.command(epilog="Example: slt shards index data/foreign --split test")
@data_errors
def index(
    path: Annotated[str, typer.Argument(help="folder of tars or its URL: index it; one .tar: list its members")],
    corpus: Annotated[str, typer.Option(help="corpus name for samples whose json has none")] = "",
    split: Annotated[
        str, typer.Option(help="split of samples whose json has none; default: the word in the tar's name, else train")
    ] = "",
    as_json: Json = False,
) -> None:
    """Index WebDataset tars made elsewhere, or list the members of one tar with offsets and checksums.

    The split of a sample comes from its json, from a word in its tar's name
    (train, dev, val, test, eval ...: phoenix-test-000.tar), or from the
    folder's name. If nothing names a split, all samples are train. Ids that
    occur in several tars become TAR/ID.
    """
    from shards.exchange.layout import is_one_tar, open_tars

    if is_one_tar(path):
        from shards.format.tar import index_tar

        folder, names = open_tars(path)
        members = [dataclasses.asdict(member) for member in index_tar(names[0], folder)]
        lines = [f"{m['offset']:>12} {m['size']:>10} {m['crc32']:08x} {m['name']}" for m in members]
        typer.echo(json.dumps(members) if as_json else "\n".join(lines))
        return
    from shards.exchange.adopt import adopt

    notes: list[str] = []
    with progress(f"index {Path(path).name}") as show:
        manifest = adopt(path, corpus, lambda done, total: show(done, total, ""), split=split, on_note=notes.append)
    print_notes(notes)
    typer.echo(
        json.dumps(manifest.to_dict())
        if as_json
        else f"{path}: {len(manifest.shards)} shards; {listed(manifest.splits)}"
    )
