"""`slt translate --long`: options, subtitles out, the report at the end. Heavy imports happen inside."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from pipeline.errors import RecipeError
from shards.cli.progress import progress
from shards.schema import Crop

if TYPE_CHECKING:
    from pipeline.evaluate.broadcasts import BroadcastScores
    from pipeline.evaluate.metrics import Scores
    from pipeline.evaluate.options import LongOptions
    from pipeline.evaluate.run import EvalRanks
    from pipeline.inference.generate import GenerationOptions
    from pipeline.inference.long_video import LongReport
    from pipeline.inference.translate import Translator

STREAM = "-"
_NO_POSE = "--pose gives the keypoints of single clips; --long takes models that read pictures alone."
SETS_HELP = "; with --long also pause_seconds=0.5, max_seconds=0 and the other values of docs/long-video.md"


@dataclass(frozen=True)
class LongSettings:
    """Further options of `slt translate`, most of them for long videos."""

    pose: Annotated[
        list[Path], typer.Option(help="keypoints of each video, in their order, for a model that reads both")
    ] = field(default_factory=list)
    long: Annotated[
        bool,
        typer.Option("--long", help="one long video, or - for a stream on stdin: find the sentences, give subtitles"),
    ] = False
    out: Annotated[Path | None, typer.Option(help="with --long: .vtt, .srt or .jsonl; default WebVTT on stdout")] = None
    segments: Annotated[
        Path | None, typer.Option(help="with --long: take the times in this .vtt, .srt, .eaf, .tsv ... as they are")
    ] = None
    tiers: Annotated[list[str], typer.Option("--tier", help="tier of an ELAN file in --segments; repeat")] = field(
        default_factory=list
    )
    crop: Annotated[
        str | None, typer.Option(help="with --long: left,top,right,bottom as fractions: only this part of the picture")
    ] = None

    language: Annotated[str, typer.Option(help="code of the language to translate to, where the prompt shows it")] = ""
    sign_language: Annotated[str, typer.Option(help="code of the sign language, where the prompt shows it")] = ""
    previous: Annotated[
        list[str], typer.Option(help="sentence before the video, where the prompt shows it; repeat, the nearest last")
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.long and (self.out, self.segments, self.tiers, self.crop) != (None, None, [], None):
            raise RecipeError("--out, --segments, --tier and --crop belong to --long: add it, or leave them out.")
        if self.long and self.pose:
            raise RecipeError(_NO_POSE)


@dataclass(frozen=True)
class EvaluateSettings:
    """The options of `slt evaluate`."""

    shards: Annotated[
        list[Path],
        typer.Option("--shards", help="shard set of what the model reads: videos, features, keypoints; repeat"),
    ] = field(default_factory=list)
    pose: Annotated[
        list[Path], typer.Option(help="keypoints of the same samples, for a model that reads both; repeat")
    ] = field(default_factory=list)
    split: Annotated[str, typer.Option(help="split to translate")] = "test"
    protocol: Annotated[str, typer.Option(help="how BLEU and ROUGE are computed: phoenix14t, csl_daily, ...")] = (
        "default"
    )
    out: Annotated[
        Path | None, typer.Option(help="folder to write; default MODEL/evaluation/SPLIT, or .../long for --long")
    ] = None
    long: Annotated[
        Path | None, typer.Option(help="instead of --shards: folder of whole videos with subtitle files of their names")
    ] = None
    subtitles: Annotated[Path | None, typer.Option(help="with --long: folder of the subtitles; default beside")] = None
    tracks: Annotated[list[str], typer.Option("--track", help="with --long: de of video.de.vtt; repeat")] = field(
        default_factory=list
    )
    tiers: Annotated[list[str], typer.Option("--tier", help="with --long: tier of ELAN files; repeat")] = field(
        default_factory=list
    )
    given_times: Annotated[
        bool, typer.Option("--given-times", help="with --long: translate at the true times instead of finding them")
    ] = False
    crop: Annotated[str | None, typer.Option(help="with --long: left,top,right,bottom as fractions")] = None
    language: Annotated[str, typer.Option(help="with --long: code of the language, where the prompt shows it")] = ""
    sign_language: Annotated[str, typer.Option(help="with --long: code of the sign language, likewise")] = ""

    def __post_init__(self) -> None:
        if (self.long is None) == (not self.shards):
            raise RecipeError(
                "slt evaluate scores either the samples of --shards or the whole videos of --long: give one."
            )
        if self.long is not None and self.pose:
            raise RecipeError(_NO_POSE)
        others = (self.subtitles, self.tracks, self.tiers, self.given_times, self.crop)
        if self.long is None and others != (None, [], [], False, None):
            raise RecipeError("--subtitles, --track, --tier, --given-times and --crop belong to --long.")
        if self.long is None and self.language + self.sign_language:
            raise RecipeError("--language and --sign-language belong to --long: a sample of a shard set has its own.")


def parse_crop(text: str | None) -> Crop | None:
    """``"0.6,0.5,1,1"``. Raises RecipeError for anything but four fractions that describe a part of the picture."""
    if text is None:
        return None
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError:
        left, top, right, bottom = 1.0, 1.0, 0.0, 0.0
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise RecipeError(
            f"--crop {text}: give left,top,right,bottom as fractions of the picture, such as 0.6,0.5,1,1."
        )
    return Crop(left, top, right, bottom)


def translate_subtitles(
    translator: Translator,
    path: Path,
    settings: LongSettings,
    options: LongOptions,
    generation: GenerationOptions,
    as_json: bool,
) -> None:
    """Translate one long video and write its subtitles while they come; then say what became of it.

    Raises:
        DataError: the video or the given times cannot be read.
        RecipeError: options that cannot work.
    """
    from pipeline.inference.long_video import LongReport, LongVideo, translate_long
    from shards.corpora.timed_texts import SubtitleFile, read_timed
    from shards.media.motion import GivenSpans

    make_spans = None
    if settings.segments is not None:
        times = [(c.start_seconds, c.end_seconds) for c in read_timed(settings.segments, settings.tiers)]
        make_spans = lambda playback: GivenSpans(times, playback.start_seconds, playback.rate)  # noqa: E731
    source: Path | BinaryIO = path
    if str(path) == STREAM:
        stdin = typer.get_binary_stream("stdin")
        source = getattr(stdin, "raw", stdin)  # unbuffered: what has arrived, without waiting for more
    video = LongVideo(source, options.spans(), make_spans, parse_crop(settings.crop), options.batch)
    report, format_of_stream = LongReport(), ".jsonl" if as_json else ".vtt"
    out = (
        SubtitleFile(typer.get_text_stream("stdout"), format_of_stream)
        if settings.out is None
        else SubtitleFile(settings.out)
    )
    with out as subtitles:
        for found in translate_long(translator, video, generation, report):
            subtitles.write(found.start_seconds, found.end_seconds, found.text)
    if as_json and settings.out is not None:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        typer.echo(report_line(report, settings.segments is not None), err=True)


def report_line(report: LongReport, given: bool) -> str:
    """What became of the video, in one line."""
    short = "given spans outside the video" if given else "moments of motion too short for a sentence"
    return f"{report.subtitles} subtitles; left out: {report.skipped} {short}, {report.without_text} without text"


def evaluate_videos(
    model: Path, settings: EvaluateSettings, sets: list[str], ranks: EvalRanks, default_device: str, as_json: bool
) -> None:
    """Subtitle the videos of `settings.long` and score them; show the scores on rank 0."""
    from pipeline.evaluate.options import LongOptions, parse_sets
    from pipeline.evaluate.run_long import Videos, evaluate_long
    from pipeline.inference.cues import StatedCues
    from pipeline.inference.translate import Translator

    assert settings.long is not None
    generation, options = parse_sets(sets, LongOptions())
    crop, target = parse_crop(settings.crop), settings.out or model / "evaluation" / "long"
    device = default_device if options.device == "auto" else options.device
    translator = Translator.from_export(model, device, options.precision)
    translator = translator.with_cues(StatedCues(settings.language, settings.sign_language))
    videos = Videos(
        settings.long,
        settings.subtitles or settings.long,
        settings.tracks,
        settings.tiers,
        settings.given_times,
        crop,
    )
    quiet = as_json or ranks.rank != 0
    with contextlib.nullcontext() if quiet else progress("subtitling videos") as on_progress:
        scores = evaluate_long(translator, videos, target, (options, generation, settings.protocol), ranks, on_progress)
    if scores is not None and as_json:
        typer.echo(json.dumps(scores.to_dict(), ensure_ascii=False, indent=1))
    elif scores is not None:
        _show_long(scores, target)


def show_table(title: str, rows: dict[str, Scores]) -> None:
    """Translation scores, one row each."""
    from rich.table import Table

    from shards.terminal import table_console

    names = ("bleu1", "bleu2", "bleu3", "bleu4", "chrf", "rouge_l", "rouge_l_mscoco")
    table = Table(title=title)
    if len(rows) > 1:
        table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for label, scores in rows.items():
        table.add_row(*([label] if len(rows) > 1 else []), *(f"{getattr(scores, name):.2f}" for name in names))
    table_console().print(table)


def _show_long(scores: BroadcastScores, target: Path) -> None:
    from shards.terminal import table_console

    found = scores.segmentation
    show_table(
        f"{scores.number_of_videos} videos, protocol {scores.sentences.protocol}",
        {"sentence by sentence": scores.sentences, "whole videos": scores.videos},
    )
    lines = (
        f"{found.hypothesis_segments} subtitles for {found.reference_segments} sentences"
        f" ({found.segments_per_reference:.2f} each): F1 {found.segment_f1:.1f} at IoU above 0.5 (precision"
        f" {found.segment_precision:.1f}, recall {found.segment_recall:.1f})",
        f"signing and rest: IoU {found.iou:.1f}, F1 {found.frame_f1:.1f}; files in {target}",
    )
    for line in lines:
        table_console().print(line, highlight=False, soft_wrap=True)
