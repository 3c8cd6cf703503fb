"""`slt translate --long`: options, subtitles out, the report at the end. Heavy imports happen inside."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from pipeline.errors import RecipeError
from shards.schema import Crop

if TYPE_CHECKING:
    from pipeline.evaluate.options import LongOptions
    from pipeline.inference.generate import GenerationOptions
    from pipeline.inference.long_video import LongReport
    from pipeline.inference.translate import Translator

STREAM = "-"
SETS_HELP = "; with --long also pause_seconds=0.5, max_seconds=0 and the other values of docs/long-video.md"


@dataclass(frozen=True)
class LongSettings:
    """The options of `slt translate` for long videos."""

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

    def __post_init__(self) -> None:
        if not self.long and (self.out, self.segments, self.tiers, self.crop) != (None, None, [], None):
            raise RecipeError("--out, --segments, --tier and --crop belong to --long: add it, or leave them out.")


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
    source: Path | BinaryIO = typer.get_binary_stream("stdin") if str(path) == STREAM else path
    video = LongVideo(source, options.spans(), make_spans, parse_crop(settings.crop), options.batch)
    report, format_of_stream = LongReport(), ".jsonl" if as_json else ".vtt"
    out = (
        SubtitleFile(typer.get_text_stream("stdout"), format_of_stream)
        if settings.out is None
        else SubtitleFile(settings.out)
    )
    with out as subtitles:
        for cue in translate_long(translator, video, generation, report):
            subtitles.write(cue.start_seconds, cue.end_seconds, cue.text)
    if as_json and settings.out is not None:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        typer.echo(report_line(report, settings.segments is not None), err=True)


def report_line(report: LongReport, given: bool) -> str:
    """What became of the video, in one line."""
    short = "given spans outside the video" if given else "moments of motion too short for a sentence"
    return f"{report.cues} subtitles; left out: {report.skipped} {short}, {report.without_text} without text"
