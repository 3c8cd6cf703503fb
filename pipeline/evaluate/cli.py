"""`slt evaluate`, `slt translate` and `slt recognise`. Heavy imports happen inside the verbs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import RecipeError
from pipeline.evaluate.long_cli import (
    SETS_HELP,
    EvaluateSettings,
    LongSettings,
    evaluate_videos,
    show_table,
    translate_subtitles,
)
from shards.cli.common import with_settings
from shards.cli.progress import progress
from shards.errors import DataError

if TYPE_CHECKING:
    from pipeline.evaluate.metrics import Scores
    from pipeline.evaluate.run import EvalRanks

_SETS_HELP = (
    "num_beams=4, max_new_tokens=64, length_penalty=1.0, device=auto|cpu|cuda:N, precision=auto|fp32|bf16{more}; repeat"
)
_EVALUATE_SETS = (
    ", corpus=NAME, references=COLUMN,COLUMN, micro_batch=8, max_samples=0, workers=0, previous=reference|predicted"
)
_LABEL_SETS = ", split=train, corpus=NAME, micro_batch=8, workers=0"
_Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the `slt` application."""
    app.command(
        epilog="Example: slt evaluate runs/phoenix/export --shards data/phoenix --split test --protocol phoenix14t"
    )(evaluate)
    app.command(epilog="Example: slt translate video.mp4 --model runs/demo/connector/export")(translate)
    app.command(epilog="Example: slt recognise runs/phoenix/contrastive/export --shards data/phoenix --split dev")(
        recognise
    )
    app.command(epilog="Example: slt pseudo-label data/news --model runs/phoenix/export --min-score 0.5")(pseudo_label)


@with_settings(EvaluateSettings)
def evaluate(
    model: Annotated[Path, typer.Argument(help="folder written by `slt export` for a connector run")],
    sets: Annotated[list[str], typer.Option("--set", help=_SETS_HELP.format(more=_EVALUATE_SETS))] = [],  # noqa: B006
    as_json: _Json = False,
    *,
    settings: EvaluateSettings,
) -> None:
    """Translate a split with an exported model and score it. Ranks of a launcher share the samples.

    With --long, whole videos with subtitle files of the same names are
    subtitled and scored instead of the samples of a shard set.
    """
    ranks, default_device = _join()
    if settings.long is not None:
        evaluate_videos(model, settings, sets, ranks, default_device, as_json)
        return
    from pipeline.evaluate.options import parse_sets
    from pipeline.evaluate.run import EvaluateOptions, evaluate_export

    split = settings.split
    defaults = EvaluateOptions(split=split, protocol=settings.protocol, device="auto")
    generation, options = parse_sets(sets, defaults, reserved=("split", "protocol", "generation", "pose"))
    device = default_device if options.device == "auto" else options.device
    options = dataclasses.replace(options, device=device, generation=generation, pose=settings.pose)
    target = settings.out or model / "evaluation" / split
    quiet = as_json or ranks.rank != 0
    with contextlib.nullcontext() if quiet else progress("translating samples") as on_progress:
        scores = evaluate_export(model, settings.shards, target, options, ranks, on_progress)
    if scores is not None and as_json:
        typer.echo(json.dumps(scores.to_dict(), ensure_ascii=False, indent=1))
    elif scores is not None:
        _show(scores, target)


@with_settings(LongSettings)
def translate(
    videos: Annotated[list[Path], typer.Argument(help="videos, or files of the keypoints or features a model reads")],
    model: Annotated[Path, typer.Option("--model", help="folder written by `slt export` for a connector run")],
    prompt: Annotated[str | None, typer.Option(help="another prompt template, with {video} once")] = None,
    between: Annotated[str | None, typer.Option(help="translate only this part, in seconds: 12.5-20")] = None,
    sets: Annotated[list[str], typer.Option("--set", help=_SETS_HELP.format(more=SETS_HELP))] = [],  # noqa: B006
    as_json: _Json = False,
    *,
    settings: LongSettings,
) -> None:
    """Translate video files with an exported model; one line of text per file.

    A file that cannot be translated is named on stderr, the others go on,
    and the exit code is 4. With --long, one broadcast becomes subtitles.
    """
    from pipeline.dist import Ranks, device_for
    from pipeline.evaluate.options import LongOptions, PlaceOptions, parse_between, parse_sets
    from pipeline.inference.cues import StatedCues
    from pipeline.inference.translate import Translator
    from shards.schema import VideoFile

    if settings.long and (len(videos) > 1 or between is not None):
        raise RecipeError("--long takes one video, and all of it: give one file, without --between.")
    if settings.pose and len(settings.pose) != len(videos):
        raise RecipeError(f"{len(settings.pose)} times --pose for {len(videos)} videos: give one per video, in order.")
    generation, place = parse_sets(sets, LongOptions() if settings.long else PlaceOptions())
    start, end = parse_between(between)
    device = str(device_for(Ranks(0, 0, 1))) if place.device == "auto" else place.device
    translator = Translator.from_export(model, device, place.precision)
    if prompt is not None:
        translator = translator.with_prompt(prompt)
    said = tuple(settings.previous)
    translator = translator.with_cues(StatedCues(settings.language, settings.sign_language, said))
    if isinstance(place, LongOptions):
        translate_subtitles(translator, videos[0], settings, place, generation, as_json)
        return
    failed: list[str] = []
    for path, poses in zip(videos, [[pose] for pose in settings.pose] or [[]] * len(videos), strict=True):
        try:
            (result,) = translator.translate([VideoFile(path, start, end)], generation, poses)
        except DataError as error:
            failed.append(str(path))
            typer.echo(f"error: {error}", err=True)
            if as_json:
                typer.echo(json.dumps({"path": str(path), "error": error.what}, ensure_ascii=False))
            continue
        if as_json:
            typer.echo(json.dumps(result.to_dict(), ensure_ascii=False))
        else:
            typer.echo(result.text if len(videos) == 1 else f"{path}\t{result.text}")
    if failed:
        if len(videos) > 1:
            typer.echo(f"{len(failed)} of {len(videos)} videos are not translated: {', '.join(failed)}", err=True)
        raise typer.Exit(DataError.exit_code)


def recognise(
    model: Annotated[Path, typer.Argument(help="folder written by `slt export` for a contrastive run with glosses")],
    shards: Annotated[list[Path], typer.Option("--shards", help="shard set; repeat for several")],
    split: Annotated[str, typer.Option(help="split to read")] = "dev",
    out: Annotated[Path | None, typer.Option(help="table to write; default MODEL/recognised/SPLIT.tsv")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="clips at once")] = 8,
    max_samples: Annotated[int, typer.Option(min=0, help="only the first clips; 0 = all")] = 0,
    as_json: _Json = False,
) -> None:
    """Read the glosses of a split with an exported gloss head: word error rate, and a table of what was read.

    The rate counts the clips that have glosses in the index.
    """
    from pipeline.dist import Ranks, device_for
    from pipeline.evaluate.recognise import RecogniseOptions, recognise_export, write_recognised

    options = RecogniseOptions(split, micro_batch, max_samples, str(device_for(Ranks(0, 0, 1))))
    with contextlib.nullcontext() if as_json else progress("reading clips") as on_progress:
        errors, found = recognise_export(model, shards, options, on_progress)
    target = out or model / "recognised" / f"{split}.tsv"
    write_recognised(target, found)
    if as_json:
        typer.echo(json.dumps({"wer": errors.wer, **dataclasses.asdict(errors)}, indent=1))
    else:
        counted = f"{errors.errors} errors in {errors.words} glosses of {errors.samples} clips"
        typer.echo(f"WER {errors.wer:.2f} % ({counted}); table: {target}")


def pseudo_label(
    shards: Annotated[Path, typer.Argument(help="shard set on disk, with texts or built with --store unlabelled=true")],
    model: Annotated[Path, typer.Option("--model", help="folder written by `slt export` for a connector run")],
    min_score: Annotated[float, typer.Option(help="least confidence, 0 to 1; below it a sample gets no label")] = 0.0,
    column: Annotated[str, typer.Option(help="name of the text column to write")] = "pseudo_label",
    replace: Annotated[bool, typer.Option("--replace", help="replace a column of this name")] = False,
    sets: Annotated[list[str], typer.Option("--set", help=_SETS_HELP.format(more=_LABEL_SETS))] = [],  # noqa: B006
    as_json: _Json = False,
) -> None:
    """Translate a split and keep the translations as a text column with confidences, to train on (`text: COLUMN` of a
    source in data.train). Ranks of a launcher share the samples.
    """
    from pipeline.evaluate import pseudo_label as labels
    from pipeline.evaluate.options import parse_sets

    reserved = ("column", "min_score", "replace", "generation")
    defaults = labels.LabelOptions(column, min_score=min_score, replace=replace, device="auto")
    generation, options = parse_sets(sets, defaults, reserved)
    ranks, default_device = _join()
    device = default_device if options.device == "auto" else options.device
    options = dataclasses.replace(options, device=device, generation=generation)
    with contextlib.nullcontext() if as_json or ranks.rank else progress("labelling samples") as on_progress:
        report = labels.pseudo_label(model, shards, options, ranks, on_progress)
    if report is not None and as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    elif report is not None:
        typer.echo(
            f"{shards}: column {column}: {report.labelled} of {report.samples} samples labelled (mean confidence"
            f" {report.mean_score:.3f}), {report.below_min_score} below {min_score:g}, {report.without_text} empty"
        )


def _join() -> tuple[EvalRanks, str]:
    """This process's share and device: alone, or as one of the ranks of a launcher."""
    from pipeline import dist
    from pipeline.evaluate.run import EvalRanks

    ranks = dist.ranks_from_environment()
    if ranks.world_size == 1:
        return EvalRanks(), str(dist.device_for(ranks))
    ranks = dist.init()
    return EvalRanks(ranks.rank, ranks.world_size, dist.barrier), str(dist.device_for(ranks))


def _show(scores: Scores, target: Path) -> None:
    from shards.terminal import table_console

    show_table(f"{scores.samples} samples, protocol {scores.protocol}", {"": scores})
    console = table_console()
    for metric, signature in scores.signatures.items():
        console.print(f"{metric}: {signature}", highlight=False, soft_wrap=True)
    console.print(f"brevity penalty {scores.brevity_penalty:.3f}; files in {target}", highlight=False, soft_wrap=True)
