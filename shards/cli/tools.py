"""``slt shards`` verbs that inspect finished shard sets or make one from another: lint, stats, preview, split, head,
convert."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from shards.cli.common import Json, Workers, app, cores, data_errors, pairs, print_notes, with_settings
from shards.cli.progress import progress
from shards.errors import DataError, OptionError
from shards.wording import listed

if TYPE_CHECKING:
    from shards.inspect.lint import LintReport

Location = Annotated[str, typer.Argument(help="shard set: a folder, or a URL of an object store")]
Tokenizer = Annotated[str, typer.Option(help="Hugging Face tokenizer folder")]
_EXAMPLES = 3


@app.command(epilog="Example: slt shards lint data/ph14t --workers 8")
@data_errors
def lint(
    location: Location,
    decode: Annotated[bool, typer.Option(help="decode every video and count its frames")] = True,
    tokenizer: Annotated[
        str, typer.Option(help="tokenizer folder: check the ids of a text set and the control tokens it knows")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="warnings fail as well")] = False,
    workers: Workers = 0,
    csv: Annotated[Path | None, typer.Option(help="also write every problem to this CSV file")] = None,
    as_json: Json = False,
) -> None:
    """Check every byte, checksum, annotation and video of a shard set.

    Errors break the set or make a sample unusable: exit code 4. Warnings are
    samples that look wrong: they fail only with --strict.
    """
    from shards.atomic import write_atomic
    from shards.inspect.lint import lint as run
    from shards.inspect.lint_shard import LintOptions

    options = LintOptions(decode=decode, tokenizer=tokenizer)
    with progress(f"lint {Path(location).name}") as show:
        report = run(location, options, workers or cores(), lambda done, total: show(done, total, ""))
    if csv is not None:
        write_atomic(csv, report.to_csv().encode())
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        _show_report(report)
    if not report.ok or (strict and report.problems):
        raise typer.Exit(DataError.exit_code)


def _show_report(report: LintReport) -> None:
    """One table row per broken rule with a few examples, then the verdict."""
    from rich.table import Table
    from rich.text import Text

    from shards.inspect.lint import rule_of
    from shards.terminal import table_console

    console = table_console()
    table = Table("", "rule", "found", "examples", show_lines=True, expand=console.is_terminal)
    table.columns[0].no_wrap = table.columns[1].no_wrap = table.columns[2].no_wrap = True
    table.columns[2].justify, table.columns[3].ratio = "right", 1
    for rule, problems in report.by_rule().items():
        known = rule_of(rule)
        lines = [f"{p.shard}{':' + p.key if p.key else ''}  {p.detail}" for p in problems[:_EXAMPLES]]
        lines += [f"and {len(problems) - _EXAMPLES:,} more"] if len(problems) > _EXAMPLES else []
        shown = Text(known.meaning, style="bold") + Text("".join(f"\n{line}" for line in lines))
        style = "red" if known.severity == "error" else "yellow"
        table.add_row(Text(known.severity, style=style), Text(rule), f"{len(problems):,}", shown)
    if report.problems:
        console.print(table)
    size = f", {report.tokens} tokens" if report.tokens else ""  # only texts have them; features have neither
    size = f", {report.frames} frames" if report.frames else size
    verdict = "ok" if not report.problems else f"{report.errors} errors, {report.warnings} warnings"
    typer.echo(
        f"{report.dir}: {verdict}; {report.shards} shards, {report.samples} samples{size}, {report.seconds:.1f} s"
    )


@app.command(epilog="Example: slt shards stats data/ph14t --plots ph14t-plots")
@data_errors
def stats(
    location: Location,
    plots: Annotated[Path | None, typer.Option(help="write charts (PNG, and one HTML page) to this folder")] = None,
    as_json: Json = False,
) -> None:
    """Samples, hours, lengths, vocabulary, signers, sizes and what the splits share."""
    from shards.format.opening import open_set
    from shards.inspect.stats import describe
    from shards.storage.store import open_folder

    if plots is not None:
        from shards.inspect.plots import need_matplotlib
        from shards.inspect.plots_page import write_plots

        need_matplotlib("--plots")
    shard_set = open_set(open_folder(location))
    figures = describe(shard_set, location)
    if plots is not None:
        written = write_plots(shard_set, figures, plots)
        typer.echo(f"{written[-1]} and {len(written) - 1} charts written", err=True)
    if as_json:
        typer.echo(json.dumps(figures))
        return
    from shards.inspect.stats_report import show

    show(figures)


@app.command(epilog="Example: slt shards preview data/ph14t --tokenizer smollm2")
@data_errors
def preview(
    location: Location,
    tokenizer: Tokenizer = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 or taken: a free one")] = 8787,
    host: Annotated[str, typer.Option(help="address to listen on; others than this machine's are for trusted nets")] = (
        "127.0.0.1"
    ),
    open_page: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
) -> None:
    """Show a shard set in the browser: search, filters, videos, annotations, tokens."""
    from shards.inspect.preview import serve
    from shards.inspect.preview_catalog import Catalog

    server = serve(Catalog(location, tokenizer), host, port)
    typer.echo(f"{location}: {server.url} (stop with Ctrl-C)")
    if open_page:
        typer.launch(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("stopped")
    finally:
        server.server_close()


@app.command(epilog="Example: slt shards head data/ph14t --out data/ph14t-small --samples 32")
@data_errors
def head(
    location: Location,
    out: Annotated[Path, typer.Option(help="new folder")],
    samples: Annotated[int, typer.Option(min=1, help="samples of every split")] = 32,
) -> None:
    """Copy the first samples of every split into a small shard set, without encoding anything again."""
    from shards.exchange.subset import head as run

    with progress(f"head {out.name}") as show:
        manifest = run(location, out, samples, lambda done, total: show(done, total, ""))
    typer.echo(f"{out}: {listed(manifest.splits)}; fingerprint {manifest.fingerprint[:12]}")


@app.command(epilog="Example: slt shards split data/mine --out data/mine-split --fractions train=0.9,dev=0.1")
@data_errors
def split(
    location: Location,
    out: Annotated[Path, typer.Option(help="new folder")],
    fractions: Annotated[str, typer.Option(help="parts of 1: train=0.9,dev=0.05,test=0.05")],
    group: Annotated[
        list[str] | None,
        typer.Option(help="samples that share a text | signer stay in one split; repeat for both. Default: text"),
    ] = None,
    seed: Annotated[int, typer.Option(help="another seed draws other splits")] = 0,
) -> None:
    """Draw new splits of a set so that no text (or signer) is in two of them; bytes are copied, not encoded."""
    from shards.exchange.subset import split as run

    parts = {}
    for name, value in pairs(fractions.split(","), "--fractions").items():
        try:
            parts[name.strip()] = float(value)
        except ValueError:
            raise OptionError(
                f"{value!r} is not a number", where=f"--fractions {name}", fix="write train=0.9"
            ) from None
    with progress(f"split {out.name}") as show:
        manifest = run(location, out, parts, group or ["text"], seed, lambda done, total: show(done, total, ""))
    typer.echo(f"{out}: {listed(manifest.splits)}; fingerprint {manifest.fingerprint[:12]}")


@dataclass(frozen=True)
class ConvertSettings:
    """The options of ``convert`` other than source and target."""

    store_format: Annotated[str, typer.Option("--format", help="wds | lmdb | mds")] = "wds"
    table: Annotated[Path | None, typer.Option(help="annotations by id: .tsv, .csv (quoted) or .psv (|)")] = None
    columns: Annotated[str, typer.Option(help="which column is which: id=name,text=translation")] = ""
    defaults: Annotated[str, typer.Option(help="for samples that do not say: language=de,split=test")] = ""
    max_skipped_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="more unusable samples fail; default: 0.05")
    ] = None
    fps: Annotated[float, typer.Option(help="frame rate of stores that hold images")] = 25.0
    storage: Annotated[list[str], typer.Option("--store", help="how samples are stored: short_side=224")] = field(
        default_factory=list
    )
    workers: Workers = 0


@app.command(
    epilog="Example: slt shards convert ph14t-lmdb --format lmdb --table all.psv --columns id=name,text=translation "
    "--out data/ph14t"
)
@data_errors
@with_settings(ConvertSettings)
def convert(
    source: Annotated[str, typer.Argument(help="folder of tars or its URL, LMDB database(s), or MDS folder")],
    out: Annotated[Path, typer.Option(help="new folder")],
    settings: ConvertSettings,
) -> None:
    """Make a shard set from another project's store: WebDataset tars, LMDB frames, MosaicML MDS.

    The split of a sample comes from its row or json, from a word in its tar's
    name (train, dev, val, test, eval ...: phoenix-test-000.tar), from
    --defaults, or from the folder's name. If nothing names a split, all
    samples are train. Ids that occur in several tars become TAR/ID.
    """
    from shards.build.encoded import encoded_lines
    from shards.cli.build import BuildSettings, build_options
    from shards.exchange.convert import ConvertOptions
    from shards.exchange.convert import convert as run

    options = ConvertOptions(
        source,
        cast(Any, settings.store_format),
        out.name,
        settings.fps,
        settings.table,
        _named(settings.columns, "--columns"),
        _named(settings.defaults, "--defaults"),
    )
    form = build_options(BuildSettings(storage=settings.storage, max_skipped_fraction=settings.max_skipped_fraction))
    workers = settings.workers or cores()
    notes: list[str] = []
    with progress(f"convert {out.name}") as show:
        manifest = run(
            options, out, form, workers, lambda state: show(state.done, state.total, state.shard), notes.append
        )
    print_notes([*notes, *encoded_lines(manifest.counts)])
    brief = {name: number for name, number in manifest.counts.items() if name.split("/")[0] in ("samples", "skipped")}
    typer.echo(f"{out}: {listed(manifest.splits)}; {listed(brief)}; fingerprint {manifest.fingerprint[:12]}")


def _named(text: str, flag: str) -> dict[str, str]:
    return pairs(text.split(","), flag) if text else {}
