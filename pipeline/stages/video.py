"""What the video stages share: clips of a plan, checks of stored features, fixed clips for probes.

Shape suffixes: B samples, N packed frames, H W C image.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from pipeline import dist
from pipeline.config.schema import DataConfig, Recipe
from pipeline.errors import RecipeError
from pipeline.inference.augment import Augment, check_augment
from pipeline.inference.clips import FetchFrames, check_poses, check_rows, holds_features
from pipeline.inference.jitter import Jitter, check_margins
from pipeline.models.streams import Inputs, Streams, frames_of
from pipeline.models.training_texts import warn_of_known_texts
from pipeline.models.visual import HierarchicalVisualEncoder, VisualEncoderConfig
from pipeline.stages.base import Batch, Stage
from pipeline.stages.data import Plans, StageContext, pose_plan, remote
from shards.load.beside import Beside
from shards.order.options import PlanOptions
from shards.order.plan import Plan

T = TypeVar("T")


class VideoStage(Stage[Batch]):
    """A stage whose items are clips."""

    @property
    def visual(self) -> HierarchicalVisualEncoder:
        """The stage's encoder."""
        found = self.module.visual
        assert isinstance(found, HierarchicalVisualEncoder)
        return found

    @classmethod
    def plan_options(cls, recipe: Recipe, train: bool) -> PlanOptions:
        data = recipe.data
        return PlanOptions(
            seed=recipe.seed,
            kind="clip",
            length_window=data.length_window if train else 0,
            epoch_samples=data.epoch_samples if train else 0,
            shuffle=train,
            max_frames=data.max_frames,
            frame_stride=data.frame_stride,
            slowest=data.augment.slowest if train else 1.0,
        )

    @classmethod
    def text_columns(cls, recipe: Recipe, train: bool) -> tuple[str, ...]:
        return tuple(recipe.data.references.train) if train else ()

    def fetch(self, train: bool) -> Callable[..., Any]:
        data = self.recipe.data
        augment = Augment(data.augment, self.recipe.seed) if train and data.augment.changed() else None
        references = tuple(data.references.train) if train else ()
        jitter = Jitter(data.jitter, self.recipe.seed) if train and data.jitter.most_seconds else None
        poses = pose_plan(data, data.train if train else data.eval)
        beside = None if poses is None else Beside(poses, remote(data))
        return FetchFrames(data.max_frames, data.frame_stride, data.image_pixels, augment, references, jitter, beside)

    def probe(self, model: Callable[..., Any]) -> dict[str, torch.Tensor]:
        inputs, lengths_B = probe_inputs(self.visual.config, self.device)
        with torch.no_grad():
            outputs = self.outputs(model, inputs, lengths_B)
        tensors = {"frames": frames_of(inputs), "frame_lengths": lengths_B, **outputs}
        if isinstance(inputs, Streams):
            tensors["pose"] = inputs.pose_NK
        return {name: value.cpu() for name, value in tensors.items()}

    @abc.abstractmethod
    def outputs(
        self, model: Callable[..., Any], frames_NHWC: Inputs, lengths_B: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Outputs (float32) that an exported model must repeat for these two clips, and their other inputs."""


def check_video(
    context: StageContext, plans: Plans, encoder: HierarchicalVisualEncoder, text_model: str | None
) -> None:
    """Refuse stored features that do not fit, and warn of held-out texts that a model was trained on.

    Args:
        encoder: the visual encoder of the stage, frozen as planned.
        text_model: folder of the model that reads or writes the scored texts; None if there is none.

    Raises:
        RecipeError: as `check_margins`, `check_augment`, `check_features` and `check_passes`.
    """
    check_beside(context.recipe.data, plans, encoder.config)
    fused = encoder.config.reads_frames and bool(encoder.config.pose_layout)
    check_margins(plans.train, context.recipe.data.jitter, fused)
    check_augment(plans.train, context.recipe.data.augment)
    for plan in plans.all():
        check_features(plan, encoder)
        if context.world_size > 1:
            check_passes(plan, encoder, context.zero_stage)
    if context.rank == 0:
        texts = [text for plan in plans.held_out for text in plan.samples.column("text").to_pylist()]
        warn_of_known_texts(text_model, texts, context.recipe.data.storage_options)


def check_passes(plan: Plan, encoder: HierarchicalVisualEncoder, zero_stage: int) -> None:
    """Refuse a sharded backbone that ranks would call differently often: every call is a collective.

    Raises RecipeError for videos with ``frames_per_pass`` under ZeRO stage 3; only for several ranks.
    """
    if zero_stage == 3 and not holds_features(plan) and (passes := encoder.config.frames_per_pass):
        raise RecipeError(
            f"model.visual.backbone.frames_per_pass: {passes} with ZeRO stage 3: a rank with more frames makes more"
            " passes, each of which gathers the backbone's weights from all ranks, so they would wait for each other"
            " for ever. Set zero_optimization.stage to 2 in the DeepSpeed section, or frames_per_pass to 0."
        )


def check_features(plan: Plan, encoder: HierarchicalVisualEncoder) -> None:
    """Refuse clips that this encoder does not read: videos without a backbone, or stored rows that are not its own.

    Raises RecipeError when the backbone trains, or the features come from another backbone or preprocessing.
    """
    if holds_features(plan) and encoder.backbone.trains:
        raise RecipeError(
            f"{plan.sources[0].shard_set.dir}: these shards hold frame features, but model.visual.backbone.train lets"
            " the backbone change; set it to frozen, or train on the video shards."
        )
    check_rows(plan, encoder.config)


def check_beside(data: DataConfig, plans: Plans, config: VisualEncoderConfig) -> None:
    """Refuse sources without the keypoints that the encoder reads beside frames, or with keypoints it does not read.

    Raises:
        RecipeError: as said, or keypoints of another layout.
        DataError: a sample without keypoints, or with another number of frames.
    """
    for sources, held in ((data.train, [plans.train]), (data.eval, plans.held_out)):
        poses = pose_plan(data, sources)
        if sources:
            check_poses(poses, config, "name them under data.train.N.pose and data.eval.N.pose")
        if poses is not None:
            beside = Beside(poses, remote(data))
            for plan in held:
                beside.check(plan)


def merge_over_ranks(value_of_sample: dict[int, T]) -> list[T]:
    """Every rank's values, in the order of the samples; equal on every rank. All ranks must call."""
    merged = {sample: value for share in dist.gather_objects(value_of_sample) for sample, value in share.items()}
    return [merged[sample] for sample in sorted(merged)]


def probe_inputs(config: VisualEncoderConfig, device: torch.device) -> tuple[Inputs, torch.Tensor]:
    """Two seeded random clips of different lengths, packed, of what the encoder reads; lengths [2]."""
    frames, lengths_B = probe_frames(config.image_pixels, device)
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(len(frames), max(config.features_width, config.pose_channels), generator=generator)
    if config.backbone_config is None:
        frames = rows[:, : config.features_width or config.pose_channels].to(device)
    if not (config.reads_frames and config.pose_layout):
        return frames, lengths_B
    return Streams(frames, rows[:, : config.pose_channels].to(device)), lengths_B


def probed_inputs(probe: dict[str, torch.Tensor]) -> Inputs:
    """The input of `probe_inputs` as a checkpoint keeps it."""
    return Streams(probe["frames"], probe["pose"]) if "pose" in probe else probe["frames"]


def probe_frames(pixels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two seeded random clips of different lengths: uint8 [N, H, W, 3] packed, lengths [2]."""
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.tensor([9, 6])
    frames_NHWC = torch.randint(0, 256, (15, pixels, pixels, 3), generator=generator, dtype=torch.uint8)
    return frames_NHWC.to(device), lengths_B.to(device)
