"""``slt shards build``: options of the corpus, the stored form and the run; the report at the end."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from shards.cli.common import (
    CORPUS_OPTIONS,
    Filters,
    Json,
    Workers,
    app,
    cores,
    data_errors,
    extra_options,
    pairs,
    with_settings,
)
from shards.cli.progress import progress
from shards.errors import OptionError
from shards.wording import listed

if TYPE_CHECKING:
    from shards.build.build import BuildOptions, BuildProgress, BuildRun
    from shards.media.rows import RowsForm
    from shards.schema import Corpus, Manifest

REPORT_NAME = "report.json"


@dataclass(frozen=True)
class BuildSettings:
    """The options of the verb other than corpus and target."""

    storage: Annotated[list[str], typer.Option("--store", help="how samples are stored: short_side=224")] = field(
        default_factory=list
    )
    rows: Annotated[
        str | None, typer.Option(help="files of features or keypoints instead of videos: feats/{split}/{id}.npy")
    ] = None
    rows_form: Annotated[
        list[str], typer.Option("--rows-are", help="what they are: kind=i3d, or layout=openpose; see docs/inputs.md")
    ] = field(default_factory=list)
    filters: Filters = field(default_factory=list)
    tokenizer: Annotated[str, typer.Option(help="tokenizer folder: needed for text, counts tokens of video texts")] = ""
    max_skipped_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="more skipped segments fail; default: the corpus's, or 0.05")
    ] = None
    workers: Workers = 0
    part: Annotated[str, typer.Option(help="I/N: build only the I-th of N shares, for array jobs")] = ""
    merge: Annotated[bool, typer.Option("--merge", help="only join parts; fails when shards are missing")] = False
    engine: Annotated[str, typer.Option(help="local: processes here; ray: the machines of a Ray cluster")] = "local"
    scratch: Annotated[Path | None, typer.Option(help="local folder for shards on their way to s3://...")] = None
    as_json: Json = False


@app.command(
    context_settings=CORPUS_OPTIONS,
    epilog="Example: slt shards build phoenix14t --root phoenix-v3 --out data/ph14t",
)
@data_errors
@with_settings(BuildSettings)
def build(
    context: typer.Context,
    corpus: Annotated[str, typer.Argument(help="phoenix14t | how2sign | table | text; see `slt shards corpora`")],
    out: Annotated[str, typer.Option(help="new folder for the shard set, or a URL: s3://bucket/prefix")],
    settings: BuildSettings,
) -> None:
    """Pack a corpus into WebDataset shards with an index and a manifest.

    Options of the corpus follow as `--key value` or `--option key=value`:
    `slt shards corpora NAME` lists them. Storage options (--store) are the
    fields of VideoOptions and BuildOptions.

    The result has the same bytes for any number of workers, parts and
    machines; a killed build continues where it stopped.
    """
    from shards.build import build as builds

    source = source_corpus(corpus, extra_options(context.args), settings.filters)
    if settings.rows is not None:
        from shards.corpora.placed import Placed

        source = Placed(source, settings.rows)
    options = build_options(settings)
    run = builds.BuildRun(
        settings.workers or (cores() if settings.engine == "local" else 0), cast(Any, settings.engine), settings.scratch
    )
    began = time.monotonic()
    if settings.part:
        if settings.merge:
            raise OptionError(
                "--part and --merge exclude each other", where="build", fix="merge when all parts are done"
            )
        _build_part(source, out, options, settings, run)
        return
    if settings.merge:
        manifest = builds.merge(source, out, options, run)
    else:
        with progress(f"build {Path(out).name}") as show:
            manifest = builds.build(source, out, options, run, _ShowSpeed(show))
    report = _write_report(source, out)
    _summary(out, manifest, report, time.monotonic() - began, settings.as_json)


def source_corpus(name: str, options: dict[str, str], filters: list[str]) -> Corpus:
    """The corpus with its options, wrapped in the text filters if there are any."""
    import typing

    from shards.corpora import make_corpus

    corpus = make_corpus(name, options)
    if not filters:
        return corpus
    from shards.filter.corpus import filtered
    from shards.filter.options import FilterOptions

    hints = typing.get_type_hints(FilterOptions)
    return cast("Corpus", filtered(corpus, FilterOptions(**typed_options(filters, "--filter", hints))))


def build_options(settings: BuildSettings) -> BuildOptions:
    """BuildOptions from ``--store`` pairs, which name fields of VideoOptions or BuildOptions."""
    import typing

    from shards.build.build import BuildOptions
    from shards.media.video import VideoOptions

    video_hints, build_hints = typing.get_type_hints(VideoOptions), typing.get_type_hints(BuildOptions)
    own = {"video", "rows", "tokenizer", "max_skipped_fraction"}
    hints = {key: hint for key, hint in (build_hints | video_hints).items() if key not in own}
    values = typed_options(settings.storage, "--store", hints)
    video = VideoOptions(**{key: value for key, value in values.items() if key in video_hints})
    rest = {key: value for key, value in values.items() if key not in video_hints}
    rest |= {"tokenizer": settings.tokenizer, "max_skipped_fraction": settings.max_skipped_fraction}
    return BuildOptions(video=video, rows=_rows_form(settings), **rest)


def _rows_form(settings: BuildSettings) -> RowsForm | None:
    """FeatureFiles or PoseFiles from ``--rows-are`` pairs, which name their fields."""
    import typing

    from shards.media.poses import PoseFiles
    from shards.media.rows import FeatureFiles

    if (settings.rows is None) != (not settings.rows_form):
        raise OptionError(
            "--rows and --rows-are belong together", where="build", fix="name the files, and what they hold"
        )
    if settings.rows is None:
        return None
    pose = any(pair.startswith("layout=") for pair in settings.rows_form)
    form: Any = PoseFiles if pose else FeatureFiles
    hints = typing.get_type_hints(form)
    values = typed_options(settings.rows_form, "--rows-are", hints)
    needed = ("layout", "rate") if pose else tuple(hints)
    if missing := [name for name in needed if name not in values]:
        raise OptionError(
            f"{', '.join(missing)} missing", where="--rows-are", fix=f"add --rows-are {missing[0]}=..., once per field"
        )
    return cast("RowsForm", form(**values))


def typed_options(arguments: list[str], flag: str, hints: dict[str, Any]) -> dict[str, Any]:
    """``key=value`` options as their fields' types. Raises OptionError for an unknown, repeated or wrong one."""
    from shards.corpora import convert, nearest

    values = pairs(arguments, flag)
    for key in values:
        if key not in hints:
            raise OptionError(f"unknown option {key!r}", where=flag, fix=nearest(key, sorted(hints)))
    return {key: convert(value, hints[key], f"{flag} {key}") for key, value in values.items()}


class _ShowSpeed:
    """Shows the progress of a build with its speed: MB stored, and hours of video per hour."""

    def __init__(self, show: Any) -> None:
        self.show, self.began = show, time.monotonic()

    def __call__(self, state: BuildProgress) -> None:
        passed = max(1e-9, time.monotonic() - self.began)
        note = f"{state.shard} skipped {state.skipped}, {state.bytes / passed / 1e6:.1f} MB/s"
        if state.seconds:
            note += f", {state.seconds / passed:.0f} h of video per h"
        self.show(state.done, state.total, note, state.before)


def _build_part(source: Corpus, out: str, options: BuildOptions, settings: BuildSettings, run: BuildRun) -> None:
    from shards.build.build import Part, build_part

    part = Part.parse(settings.part)
    with progress(f"build {Path(out).name} part {part}") as show:
        shards = build_part(source, out, options, part, run, _ShowSpeed(show))
    if settings.as_json:
        typer.echo(json.dumps({"out": out, "part": str(part), "shards": shards, "finished": shards is None}))
    elif shards is None:
        typer.echo(f"{out}: finished already, nothing to do for part {part}")
    else:
        typer.echo(f"{out}: part {part} is done, {shards} shards; --merge joins the parts when all are")


def _write_report(source: Corpus, out: str) -> dict[str, Any]:
    """The preparation report of a finished set, also saved beside its manifest."""
    import tempfile

    from shards.build.build import SKIPPED_NAME
    from shards.build.report import corpus_report
    from shards.format.index import INDEX_NAME, MANIFEST_NAME
    from shards.storage.store import open_folder

    folder = open_folder(out)
    with tempfile.TemporaryDirectory(prefix="slt-report-") as scratch:
        local = folder.path(MANIFEST_NAME).parent if folder.is_local else Path(scratch)
        if not folder.is_local:
            for name in (INDEX_NAME, MANIFEST_NAME, SKIPPED_NAME):
                folder.download(name, local / name)
        report = corpus_report(source, local)
    folder.write(REPORT_NAME, json.dumps(report, indent=1, ensure_ascii=False).encode())
    return report


def _summary(out: str, manifest: Manifest, report: dict[str, Any], seconds: float, as_json: bool) -> None:
    from shards.build.report import report_lines

    size = sum(shard["size"] for shard in manifest.shards)
    if as_json:
        figures: dict[str, Any] = {
            "out": out,
            "fingerprint": manifest.fingerprint,
            "splits": manifest.splits,
            "counts": manifest.counts,
            "shards": len(manifest.shards),
            "bytes": size,
            "seconds": round(seconds, 1),
            "report": report,
        }
        typer.echo(json.dumps(figures, ensure_ascii=False))
        return
    typer.echo("\n".join(report_lines(report)))
    typer.echo(f"{out}: {len(manifest.shards)} shards, {size / 1e6:.1f} MB, fingerprint {manifest.fingerprint[:12]}")
    typer.echo(f"samples: {listed(manifest.splits)}; skipped: {manifest.counts['skipped']}")
