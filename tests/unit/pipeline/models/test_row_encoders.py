"""Encoders of keypoints and of stored features: what they compute, what they refuse, and what an export keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.inputs_schema import FeaturesConfig, PoseConfig
from pipeline.config.schema import BackboneConfig, VisualConfig
from pipeline.errors import DataError
from pipeline.models.pose_level import PoseLevel, group_inputs
from pipeline.models.registry import build_visual
from pipeline.models.streams import Inputs, Streams, with_frames
from pipeline.models.visual import HierarchicalVisualEncoder
from pipeline.stages.video import probe_inputs, probed_inputs
from shards.media.pose_layouts import LAYOUTS
from tests.unit.pipeline.models.tiny import PIXELS, visual_config

POSE = PoseConfig(layout="synthetic", width=8)
FEATURES = FeaturesConfig(fingerprint="mine", width=12)
KINDS: dict[str, dict[str, Any]] = {
    "pose": {"backbone": None, "pose": POSE},
    "features": {"backbone": None, "features": FEATURES},
    "images and pose": {"pose": POSE},
    "features and pose": {"backbone": None, "features": FEATURES, "pose": POSE},
}


def build(kind: str, pixels: int = PIXELS) -> HierarchicalVisualEncoder:
    torch.manual_seed(0)
    return build_visual(visual_config(**KINDS[kind]), pixels, torch.float32).eval()


def two_clips(encoder: HierarchicalVisualEncoder) -> tuple[Inputs, torch.Tensor]:
    return probe_inputs(encoder.config, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_computes_the_same(kind: str, tmp_path: Path) -> None:
    encoder = build(kind)
    inputs, lengths_B = two_clips(encoder)
    output = encoder(inputs, lengths_B)
    assert output.words_MD.shape == (5, 32) and output.sentence_BD.shape == (2, 32)
    encoder.save_pretrained(tmp_path)
    again = build_visual(
        VisualConfig(path=str(tmp_path)), 64 if kind in ("pose", "features") else PIXELS, torch.float32
    )
    again.eval()
    assert again.config.to_dict() == encoder.config.to_dict() | {
        name: again.config.to_dict()[name] for name in ("backbone_fingerprint", "_name_or_path")
    }
    assert torch.equal(again(inputs, lengths_B).sentence_BD, output.sentence_BD)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind: str) -> None:
    encoder = build(kind).train()
    output = encoder(*two_clips(encoder))
    (output.words_MD.square().sum() + output.sentence_BD.square().sum()).backward()
    without = [name for name, weight in encoder.named_parameters() if weight.grad is None]
    assert not without


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_alone_gives_what_it_gives_in_a_batch(kind: str) -> None:
    encoder = build(kind)
    inputs, lengths_B = two_clips(encoder)
    count = int(lengths_B[0])
    first = Streams(*(part[:count] for part in inputs)) if isinstance(inputs, Streams) else inputs[:count]
    alone = encoder(first, lengths_B[:1]).words_MD
    torch.testing.assert_close(encoder(inputs, lengths_B).words_MD[: len(alone)], alone)


def test_the_sum_of_both_streams(tmp_path: Path) -> None:
    """Without keypoints' weights a fused encoder is the encoder of its frames; without frames', of its keypoints."""
    encoder = build("features and pose")
    inputs, lengths_B = two_clips(encoder)
    assert isinstance(inputs, Streams)
    with torch.no_grad():
        both = encoder(inputs, lengths_B).words_MD
        for projection, kind, alone in (
            (encoder.pose_projection, "features", inputs.frames), (encoder.frame_projection, "pose", inputs.pose_NK),
        ):  # fmt: skip
            kept = {name: value.clone() for name, value in projection.state_dict().items()}
            projection.weight.zero_()
            projection.bias.zero_()
            single = build(kind)
            single.load_state_dict(encoder.state_dict(), strict=False)
            torch.testing.assert_close(encoder(inputs, lengths_B).words_MD, single(alone, lengths_B).words_MD)
            projection.load_state_dict(kept)
        assert torch.equal(encoder(inputs, lengths_B).words_MD, both)


def test_identities_of_stored_rows() -> None:
    pose = LAYOUTS["synthetic"].fingerprint
    assert build("pose").config.rows_fingerprint == pose
    assert build("features").config.rows_fingerprint == "mine"
    fused = build("features and pose").config
    assert (fused.rows_fingerprint, fused.pose_fingerprint) == ("mine", pose)
    assert build("pose").stored_width() == 90 and build("features").stored_width() == 12


def test_missing_joints_change_nothing_but_their_own_mask() -> None:
    rows = torch.rand(5, 10, 3) + 0.1
    rows[:, 3] = 0.0
    inputs = group_inputs(rows)
    middle = rows[:, [0, 1, 2, *range(4, 10)], :2].mean(1)
    torch.testing.assert_close(inputs[:, 30:32], middle)
    assert (inputs[:, 6:8] == 0).all() and (inputs[:, 23] == 0).all()
    assert (group_inputs(torch.zeros(2, 10, 3)) == 0).all()


def test_the_shape_of_a_group_depends_on_neither_place_nor_size() -> None:
    rows = torch.rand(4, 10, 3) + 0.1
    moved = rows.clone()
    moved[..., :2] = 3 * moved[..., :2] + torch.tensor([5.0, -2.0])
    torch.testing.assert_close(group_inputs(moved)[:, :30], group_inputs(rows)[:, :30], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(group_inputs(moved)[:, 32], 3 * group_inputs(rows)[:, 32])


def test_half_precision_rows_and_weights() -> None:
    level = PoseLevel([3, 4], 6).to(torch.bfloat16)
    assert level(torch.rand(5, 21, dtype=torch.float16)).dtype == torch.bfloat16


def test_frozen_backbone_features_keep_the_keypoints() -> None:
    pose = torch.rand(3, 6)
    kept = with_frames(Streams(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), pose), torch.ones(3, 4))
    assert isinstance(kept, Streams) and kept.pose_NK is pose and kept.frames.shape == (3, 4)
    assert with_frames(pose, torch.ones(3, 4)) is not pose
    assert torch.equal(probed_inputs({"frames": pose, "pose": pose})[1], pose)


def test_inputs_of_another_kind() -> None:
    lengths_B = torch.tensor([3])
    with pytest.raises(DataError, match=r"expected stored rows \(N, 90\), for the encoder has no backbone"):
        build("pose")(torch.rand(3, 60), lengths_B)
    fused = build("features and pose")
    with pytest.raises(DataError, match="the encoder reads frames and keypoints, only one was given"):
        fused(torch.rand(3, 12), lengths_B)
    with pytest.raises(DataError, match=r"keypoints are \(2, 90\), expected \(3, 90\)"):
        fused(Streams(torch.rand(3, 12), torch.rand(2, 90)), lengths_B)
    with pytest.raises(DataError, match="the encoder reads one stream, two were given"):
        build("features")(Streams(torch.rand(3, 12), torch.rand(3, 90)), lengths_B)


def test_nothing_to_freeze_without_a_backbone() -> None:
    encoder = build("pose")
    encoder.freeze_backbone()
    assert not encoder.backbone.trains and all(weight.requires_grad for weight in encoder.parameters())
    assert BackboneConfig().train == "full" and encoder.config.backbone_train == "frozen"
