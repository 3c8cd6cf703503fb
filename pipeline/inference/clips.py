"""Clips of a plan as model inputs, for every stage and evaluation with video. Runs in loader processes.

Legend: N packed frames, T frames, H W C image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch

from pipeline.errors import RecipeError
from pipeline.inference.augment import Augment
from pipeline.inference.cues import apart
from pipeline.inference.jitter import Jitter
from pipeline.inference.references import shown_text, texts_of_sample
from pipeline.models.clip_layout import ClipLayout, ClipSizes
from pipeline.models.processing import LlavaSltProcessor, Prompts
from pipeline.models.streams import Inputs, Streams
from pipeline.models.visual import VisualEncoderConfig
from shards.format.index import MANIFEST_NAME
from shards.load.beside import Beside
from shards.load.features import read_features
from shards.load.reader import SampleReader, wanted_frames
from shards.media.poses import POSE
from shards.order.plan import Plan
from shards.schema import IndexRow


class FusedClip(NamedTuple):
    """Frames of a clip, and its keypoints of the same moments."""

    frames: np.ndarray
    pose_TK: np.ndarray


ClipArray = np.ndarray | FusedClip
"""Decoded frames [T, H, W, 3] of a clip, its stored rows [T, P], or frames and keypoints."""
Clip = tuple[ClipArray, IndexRow]
"""What a clip shows, and its index row."""


class Clips(TypedDict):
    """Clips of a micro-batch, one after another."""

    frames_NHWC: Inputs
    """uint8 [N, H, W, 3], stored rows [N, P], or frames with keypoints."""
    frame_lengths_B: torch.Tensor
    layout: ClipLayout
    rows: list[IndexRow]


class VideoPrompts(Prompts):
    """Input of a translation: left padded prompts and the frames of their videos."""

    frames_NHWC: Inputs
    frame_lengths_B: torch.Tensor
    layout: ClipLayout


class PromptBatch(VideoPrompts):
    """Prompts of samples, with the samples' index rows."""

    rows: list[IndexRow]


def holds_features(plan: Plan) -> bool:
    """Whether the plan's samples are stored frame features rather than videos."""
    return plan.sources[0].shard_set.manifest.kind == "features"


def holds_keypoints(plan: Plan) -> bool:
    """Whether the plan's samples are keypoints."""
    stored = plan.sources[0].shard_set.manifest.options.get("features")
    return isinstance(stored, dict) and stored.get("kind") == POSE


def check_rows(plan: Plan, config: VisualEncoderConfig) -> None:
    """Refuse clips that an encoder does not read: videos where it has no backbone, stored rows that are not its own.

    Raises RecipeError, also for rows without a fingerprint.
    """
    if not holds_features(plan) and config.backbone_config is None:
        raise RecipeError(
            f"{plan.sources[0].shard_set.dir}: these shards hold videos, but the model has no backbone; it reads"
            f" {'stored features' if config.reads_frames else f'keypoints of the layout {config.pose_layout}'}. Name"
            " shards that were built with --rows (docs/inputs.md)."
        )
    fingerprint = config.rows_fingerprint
    for source in plan.sources if holds_features(plan) else ():
        where = f"{source.shard_set.dir}: these shards hold frame features"
        stored = source.shard_set.manifest.options.get("features")
        if not isinstance(stored, dict) or "fingerprint" not in stored:
            raise RecipeError(
                f"{where}, but {MANIFEST_NAME} lacks options.features.fingerprint: it does not say which backbone and"
                " preprocessing made them, so nothing can tell whether the model's backbone agrees. Use the video"
                " shards, or extract the features with `slt shards features SHARDS --recipe RECIPE --out DIR`; for tars"
                f" that this command wrote, put their own {MANIFEST_NAME} back."
            )
        if stored["fingerprint"] != fingerprint:
            raise RecipeError(
                f"{where} of another backbone or preprocessing (theirs {_shown(stored)}, the model's fingerprint is"
                f" {fingerprint or 'none: its weights are random'}); {_FIX_ROWS[config.backbone_config is None]}."
            )


def check_poses(poses: Plan | None, config: VisualEncoderConfig, how: str) -> None:
    """Refuse keypoints beside frames that an encoder does not read, and their absence where it does.

    Args:
        poses: the keypoints given; None = none.
        config: of the encoder.
        how: to give them, for the message.

    Raises:
        RecipeError: says what is missing, too much, or of another layout.
    """
    fused = config.reads_frames and bool(config.pose_layout)
    if fused != (poses is not None):
        what = "reads keypoints beside frames, but none are given" if fused else "does not read keypoints beside frames"
        fix = f"{how} (docs/inputs.md)." if fused else "leave them out, or train an encoder with model.visual.pose."
        raise RecipeError(f"the visual encoder {what}; {fix}")
    for source in () if poses is None else poses.sources:
        stored = source.shard_set.manifest.options.get("features")
        stored = stored if isinstance(stored, dict) else {}
        if stored.get("fingerprint") != config.pose_fingerprint:
            raise RecipeError(
                f"{source.shard_set.dir}: these shards hold {_shown(stored)}, the visual encoder reads keypoints of the"
                f" layout {config.pose_layout} (fingerprint {config.pose_fingerprint}); {_FIX_ROWS[True]}."
            )


_FIX_ROWS = {
    False: "use the video shards, or extract them again: `slt shards features SHARDS --recipe RECIPE --out DIR`",
    True: "build the shards with the layout or the fingerprint that the model names (docs/inputs.md)",
}


def _shown(stored: dict[str, object]) -> dict[str, object]:
    """What a set records of its rows, without the long list of joints."""
    return {name: value for name, value in stored.items() if name != "joints"}


@dataclass(frozen=True, slots=True)
class FetchFrames:
    """Decoded frames of a clip, or its stored frame features, and its index row; runs in loader processes."""

    max_frames: int
    frame_stride: int
    image_pixels: int
    augment: Augment | None = None
    """What training changes in clips; None = nothing."""
    references: tuple[str, ...] = ()
    """Text columns of which training takes the place of a row's text at times; its `text_hash` stays."""
    jitter: Jitter | None = None
    """How training moves their cuts; None = not at all."""
    beside: Beside | None = None
    """Keypoints that a fused encoder reads beside them."""

    @property
    def draws(self) -> bool:
        """Whether it has to know how often a sample was shown before."""
        return self.augment is not None or self.jitter is not None or bool(self.references)

    def __call__(self, reader: SampleReader, item: np.ndarray) -> list[Clip]:
        if self.draws:
            shown = zip(item["sample"].tolist(), item["showing"].tolist(), strict=True)
            return [(self._drawn(reader, *each), self._row(reader, *each)) for each in shown]
        return [(self._clip(reader, int(sample)), reader.row(int(sample))) for sample in item["sample"]]

    def _row(self, reader: SampleReader, sample: int, showing: int) -> IndexRow:
        row, plan = reader.row(sample), reader.plan
        texts = texts_of_sample(plan.samples, sample, row.text, self.references)
        return row._replace(text=shown_text(texts, plan.options.seed, sample, showing))

    def _drawn(self, reader: SampleReader, sample: int, showing: int) -> ClipArray:
        stored, augment = reader.stored_frames(sample), self.augment
        offset = 0 if self.jitter is None else self.jitter.offset(reader, sample, showing)
        if augment is None and not offset:
            return self._clip(reader, sample)
        if augment is None:
            chosen = wanted_frames(stored, self.max_frames, self.frame_stride)
            numbers = list(range(stored)) if chosen is None else chosen
        else:
            numbers = augment.frame_numbers(sample, showing, stored, self.max_frames, self.frame_stride)
        numbers = [number + offset for number in numbers]
        frames: np.ndarray
        if augment is None:
            frames = reader.decoded(sample, numbers, self.image_pixels)
        elif holds_features(reader.plan):
            frames = augment.features(reader, sample, showing, numbers)
            if holds_keypoints(reader.plan):
                frames = augment.keypoints(frames, sample, showing)
        else:
            frames = augment.frames(reader, sample, showing, numbers, self.image_pixels)
        clip = self._with_pose(reader, sample, frames, numbers)
        if augment is None or not isinstance(clip, FusedClip):
            return clip
        return clip._replace(pose_TK=augment.keypoints(clip.pose_TK, sample, showing))

    def _clip(self, reader: SampleReader, sample: int) -> ClipArray:
        wanted = wanted_frames(reader.stored_frames(sample), self.max_frames, self.frame_stride)
        return self._with_pose(reader, sample, self._frames(reader, sample), wanted)

    def _with_pose(self, reader: SampleReader, sample: int, frames: np.ndarray, numbers: list[int] | None) -> ClipArray:
        """The clip with its keypoints of the same frames, if the encoder reads them beside it."""
        if self.beside is None:
            return frames
        rows_TK = self.beside.rows(reader.row(sample))
        return FusedClip(frames, rows_TK if numbers is None else rows_TK[numbers])

    def _frames(self, reader: SampleReader, sample: int) -> np.ndarray:
        if holds_features(reader.plan):
            return read_features(reader, sample, self.max_frames, self.frame_stride)
        return reader.frames(sample, self.max_frames, self.frame_stride, self.image_pixels)


def clip_length(clip: ClipArray) -> int:
    """Frames of a clip."""
    return len(clip.frames if isinstance(clip, FusedClip) else clip)


def pack_arrays(clips: Sequence[ClipArray]) -> Inputs:
    """Clips one after another, as an encoder reads them."""
    fused = [clip for clip in clips if isinstance(clip, FusedClip)]
    if not fused:
        return torch.from_numpy(np.concatenate([clip for clip in clips if not isinstance(clip, FusedClip)]))
    parts = (np.concatenate([clip[number] for clip in fused]) for number in range(2))
    return Streams(*(torch.from_numpy(part) for part in parts))


def pack_clips(items: list[list[Clip]], sizes: ClipSizes) -> Clips:
    """Clips of all items -> one micro-batch, laid out for an encoder of these sizes.

    Raises:
        DataError: an empty clip, or one longer than the encoder takes.
    """
    clips = [clip for item in items for clip in item]
    lengths = [clip_length(array) for array, _ in clips]
    return {
        "frames_NHWC": pack_arrays([array for array, _ in clips]),
        "frame_lengths_B": torch.tensor(lengths),
        "layout": ClipLayout.of(lengths, sizes),
        "rows": [row for _, row in clips],
    }


@dataclass(frozen=True, slots=True)
class CollatePrompts:
    """Clips -> packed frames and left padded prompts, with the index rows; runs in loader processes."""

    processor: LlavaSltProcessor
    sizes: ClipSizes

    def __call__(self, items: list[list[Any]]) -> PromptBatch:
        """``items``: what the fetch of `with_cues` gives."""
        items, cues = apart(items, self.processor)
        clips = pack_clips(items, self.sizes)
        return {**clips, **self.processor(clips["frame_lengths_B"].tolist(), cues=cues)}
