"""Translate any video file with an exported model: convert it to the form the model was trained on, then generate.

A model of keypoints or of stored features translates files of these instead.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import CheckpointError, RecipeError
from pipeline.inference.clips import ClipArray, FusedClip, VideoPrompts, clip_length, pack_arrays
from pipeline.inference.cues import StatedCues, stated_cues
from pipeline.inference.generate import GenerationOptions, check_fits, translate_batch
from pipeline.inference.load import VIDEO_FORM, Precision, load_export
from pipeline.inference.rows import ROWS_FORM, RowForms, read_row_forms
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.processing import LlavaSltProcessor
from shards.load.beside import fitted
from shards.load.reader import wanted_frames
from shards.media.rows import RowsForm
from shards.media.video import VideoOptions, decode, probe, transcode
from shards.names import located
from shards.schema import RowsFile, VideoFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Translation:
    """The text of one video."""

    path: Path
    text: str
    frames: int
    """Frames the encoder saw."""
    duration_seconds: float

    def to_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "path": str(self.path)}


def read_video_form(export_dir: Path) -> VideoOptions:
    """Frame rate and size of the training shards; to a model, other speeds and scales are another language.

    Raises:
        CheckpointError: the file exists but does not hold video options.
    """
    path = export_dir / VIDEO_FORM
    if not path.is_file():
        form = VideoOptions()
        logger.warning(
            "%s does not say how its training videos were stored; assuming the defaults: %g frames per second, "
            "short side %d pixels",
            export_dir,
            form.fps,
            form.short_side,
        )
        return form
    try:
        return VideoOptions.from_record(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold video options ({error}); export the run again.") from error


class Translator:
    """A loaded model that translates videos; keep one for many calls.

    Args:
        model: in eval mode, on the device to use.
        processor: tokenizer, prompt and frame sizes.
        form: how training videos were stored.
        rows: how files of keypoints or features are read, for a model of these.

    Raises:
        CheckpointError: the model reads rows and nothing says how.
    """

    def __init__(
        self,
        model: LlavaSltForConditionalGeneration,
        processor: LlavaSltProcessor,
        form: VideoOptions,
        rows: RowForms | None = None,
    ) -> None:
        self.model, self.processor, self.form, self.rows = model, processor, form, rows or RowForms()
        self.stated = StatedCues()
        """What the prompt shows of every video, beyond the sentences that were translated before."""
        config = model.visual.config
        self.reads_rows = config.backbone_config is None
        self.fused = config.reads_frames and bool(config.pose_layout)
        if (self.reads_rows and self.rows.alone is None) or (self.fused and self.rows.pose is None):
            raise CheckpointError(f"the model reads stored rows, but has no {ROWS_FORM}; export the run again.")
        self._fitting: GenerationOptions | None = None

    @classmethod
    def from_export(
        cls, export_dir: Path, device: torch.device | str = "cpu", precision: Precision = "auto"
    ) -> Translator:
        """Load an exported folder. Raises CheckpointError when it cannot be used."""
        model, processor = load_export(export_dir, device, precision)
        reads_rows = model.visual.config.backbone_config is None
        form = VideoOptions() if reads_rows else read_video_form(export_dir)
        return cls(model, processor, form, read_row_forms(export_dir))

    def with_prompt(self, prompt: str) -> Translator:
        """The same model with another prompt template. Raises RecipeError when it lacks ``{video}``."""
        options = dataclasses.replace(self.processor.options, prompt=prompt)
        other = Translator(self.model, LlavaSltProcessor(self.processor.tokenizer, options), self.form, self.rows)
        other.stated = self.stated
        return other

    def with_cues(self, stated: StatedCues) -> Translator:
        """The same model with what its prompt shall show. Raises DataError for a language without a name, or a cue that
        is neither stated nor may be empty."""
        other = Translator(self.model, self.processor, self.form, self.rows)
        other.stated = stated
        stated_cues(self.processor, stated)
        return other

    def read(self, media: VideoFile, pose: Path | None = None) -> ClipArray:
        """Frames uint8 [T, H, W, 3] as the encoder sees them in training: stored form, stride, limit, square crop. Rows
        [T, W] of a file of keypoints or features, where the model reads these; both, with the keypoints of ``pose``.

        Raises:
            DataError: missing or damaged media, nothing between the two times, or keypoints of another length.
        """
        sizes, times = self.processor.options, (media.start_seconds, media.end_seconds)
        if self.reads_rows:
            rows_TW = self._form().read(RowsFile(media.path, *times))
            stored, chosen = len(rows_TW), wanted_frames(len(rows_TW), sizes.max_frames, sizes.frame_stride)
            frames = rows_TW if chosen is None else rows_TW[chosen]
        else:
            payload = transcode(media, self.form)
            stored, frames = probe(payload).frames, self.frames(payload, str(media.path))
        if pose is None:
            return frames
        assert self.rows.pose is not None  # checked when the translator was made
        rows_TK = fitted(self.rows.pose.read(RowsFile(pose, *times)), stored, str(pose))
        chosen = wanted_frames(stored, sizes.max_frames, sizes.frame_stride)
        return FusedClip(frames, rows_TK if chosen is None else rows_TK[chosen])

    def frames(self, payload: bytes, where: str) -> np.ndarray:
        """Frames uint8 [T, H, W, 3] of a video in the stored form, as the encoder sees them in training."""
        stored, sizes = probe(payload).frames, self.processor.options
        frame_numbers = wanted_frames(stored, sizes.max_frames, sizes.frame_stride)
        return decode(payload, stored, frame_numbers, sizes.image_pixels, where=where)

    def translate(
        self, media: Sequence[VideoFile], options: GenerationOptions | None = None, poses: Sequence[Path] = ()
    ) -> list[Translation]:
        """Translate videos (or parts of them) as one batch; ``poses``: their keypoints, for a model that reads both.

        Raises as `read`, and RecipeError for more new tokens than the LLM has positions for, or keypoints that the
        model lacks or does not read.
        """
        options = options or GenerationOptions()
        self.check(options)
        if len(poses) != (len(media) if self.fused else 0):
            what = "reads keypoints beside frames: give one file of them per video"
            what = what if self.fused else "does not read keypoints beside frames: leave them out"
            raise RecipeError(f"{len(poses)} files of keypoints for {len(media)} clips, but the model {what} (--pose).")
        media = [located(video) for video in media]
        files: list[Path | None] = [*poses] or [None] * len(media)
        clips = [self.read(video, pose) for video, pose in zip(media, files, strict=True)]
        texts = self.translate_clips(clips, options)
        return [
            Translation(video.path, text, clip_length(clip), self._seconds(video))
            for video, text, clip in zip(media, texts, clips, strict=True)
        ]

    def translate_clips(
        self, clips: Sequence[ClipArray], options: GenerationOptions, before: Sequence[str] = ()
    ) -> list[str]:
        """Texts of clips as `read` or `frames` gives them, translated as one batch.

        Args:
            clips: their frames.
            options: search options.
            before: the sentences before all of them, the nearest last; without any, those that are stated.

        Raises:
            RecipeError: as `check`.
            DataError: the prompt shows a cue that is not stated.
        """
        cues = stated_cues(self.processor, self.stated, before)
        self.check(options)
        lengths = [clip_length(clip) for clip in clips]
        batch: VideoPrompts = {
            "frames_NHWC": pack_arrays(clips),
            "frame_lengths_B": torch.tensor(lengths),
            "layout": ClipLayout.of(lengths, self.model.visual.config.clip_sizes()),
            **self.processor(lengths, cues=[cues] * len(lengths)),
        }
        return translate_batch(self.model, self.processor, batch, options)

    def check(self, options: GenerationOptions) -> None:
        """Raises RecipeError for more new tokens than the LLM has positions for."""
        if options != self._fitting:  # checked once, not for every video
            check_fits(self.model, self.processor, options, "the export")
            self._fitting = options

    def _form(self) -> RowsForm:
        assert self.rows.alone is not None  # checked when the translator was made
        return self.rows.alone

    def _seconds(self, media: VideoFile) -> float:
        if media.end_seconds is not None:
            end = media.end_seconds
        elif self.reads_rows:
            return len(self._form().read(RowsFile(media.path, media.start_seconds))) / self._form().rate
        else:
            end = probe(media.path).duration_seconds
        return end - (media.start_seconds or 0.0)


def translate_file(
    export_dir: Path,
    video: Path | VideoFile,
    options: GenerationOptions | None = None,
    prompt: str | None = None,
    device: torch.device | str = "cpu",
    cues: StatedCues | None = None,
) -> str:
    """Translate one video file with an exported model.

    Args:
        export_dir: folder written by `slt export`.
        video: any file FFmpeg reads, or a part of one; a file of rows for a model of these.
        options: search options; default greedy.
        prompt: template instead of the trained one; must contain ``{video}`` once.
        device: where to run.
        cues: what the prompt shows besides the video, where it does.

    Raises:
        CheckpointError: the export cannot be used.
        DataError: the video cannot be read, or the prompt shows a cue that is not stated.
        RecipeError: the prompt has no ``{video}``.
    """
    translator = Translator.from_export(export_dir, device)
    if prompt is not None:
        translator = translator.with_prompt(prompt)
    translator = translator.with_cues(cues or StatedCues())
    media = VideoFile(video) if isinstance(video, Path) else video
    return translator.translate([media], options)[0].text
