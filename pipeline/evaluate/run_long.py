"""Evaluate an exported model on whole videos: subtitles for each, written beside the scores.

Ranks share the videos and meet only in a barrier, as in `pipeline.evaluate.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.evaluate.broadcasts import BroadcastScores, Subtitled, score_broadcasts
from pipeline.evaluate.options import LongOptions
from pipeline.evaluate.protocols import get_protocol
from pipeline.evaluate.report import write_long_scores
from pipeline.evaluate.run import EvalRanks
from pipeline.inference.generate import GenerationOptions
from pipeline.inference.long_video import LongReport, LongVideo, translate_long
from pipeline.inference.translate import Translator
from shards.corpora.captions import Caption, read_captions, sound_only
from shards.corpora.subtitle_files import match_subtitles
from shards.corpora.timed_texts import SubtitleFile, read_timed
from shards.errors import DataError
from shards.media.motion import GivenSpans
from shards.media.video import probe
from shards.schema import Crop

WRITTEN = "subtitles"


@dataclass(frozen=True, slots=True)
class Videos:
    """Long videos and their true subtitles."""

    folder: Path
    subtitles: Path
    tracks: Sequence[str] = ()
    tiers: Sequence[str] = ()
    """Of ELAN files."""
    given_times: bool = False
    """Translate the true sentences' times instead of finding them: what segmentation costs."""
    crop: Crop | None = None


@dataclass(frozen=True, slots=True)
class _Pair:
    name: str
    video: Path
    reference: list[Caption]


def evaluate_long(
    translator: Translator,
    videos: Videos,
    out_dir: Path,
    settings: tuple[LongOptions, GenerationOptions, str],
    ranks: EvalRanks | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BroadcastScores | None:
    """Subtitle every video of a folder and score them together.

    Args:
        translator: the loaded model.
        videos: folder of videos with true subtitles.
        out_dir: where ``subtitles/NAME.vtt`` and ``scores.json`` go; all ranks must see it.
        settings: how sentences are found, search options, name of the scoring protocol.
        ranks: this process's share.
        on_progress: called with (videos done, all of this rank).

    Returns:
        The scores on rank 0, None on the others.

    Raises:
        DataError: no video with subtitles, or one that cannot be read.
        RecipeError: unknown protocol.
    """
    (options, generation, name), ranks = settings, ranks or EvalRanks()
    protocol, pairs = get_protocol(name), _pairs(videos)
    mine = pairs[ranks.rank :: ranks.world_size]
    for number, pair in enumerate(mine, 1):
        _subtitle(translator, pair, videos, _written(out_dir, pair), (options, generation))
        if on_progress is not None:
            on_progress(number, len(mine))
    ranks.barrier()
    if ranks.rank != 0:
        return None
    subtitled = [
        Subtitled(pair.name, probe(pair.video).duration_seconds, pair.reference, read_captions(_written(out_dir, pair)))
        for pair in pairs
    ]
    scores = score_broadcasts(subtitled, protocol)
    about = {
        "videos": [pair.name for pair in pairs],
        "given_times": videos.given_times,
        "generation": generation.to_dict(),
        "spans": vars(options.spans()),
    }
    write_long_scores(out_dir, scores, protocol, about)
    return scores


def _pairs(videos: Videos) -> list[_Pair]:
    found = [pair for pair in match_subtitles(videos.folder, videos.subtitles, "", list(videos.tracks)) if pair.path]
    pairs = []
    for pair in found:
        assert pair.path is not None
        if pair.subtitles is None:
            fix = f"put {pair.name}.vtt (or .srt, .eaf ...) into {videos.subtitles}, or take the video out"
            raise DataError("the video has no true subtitles", where=str(pair.path), fix=fix)
        captions = [caption for caption in read_timed(pair.subtitles, videos.tiers) if not sound_only(caption.text)]
        pairs.append(_Pair(pair.name, pair.path, captions))
    return pairs


def _subtitle(
    translator: Translator,
    pair: _Pair,
    videos: Videos,
    out: Path,
    options: tuple[LongOptions, GenerationOptions],
) -> None:
    times = [(caption.start_seconds, caption.end_seconds) for caption in pair.reference]
    given = (lambda playback: GivenSpans(times, playback.start_seconds, playback.rate)) if videos.given_times else None
    video = LongVideo(pair.video, options[0].spans(), given, videos.crop, options[0].batch)
    with SubtitleFile(out) as subtitles:
        for found in translate_long(translator, video, options[1], LongReport()):
            subtitles.write(found.start_seconds, found.end_seconds, found.text)


def _written(out_dir: Path, pair: _Pair) -> Path:
    return out_dir / WRITTEN / f"{pair.name}.vtt"
