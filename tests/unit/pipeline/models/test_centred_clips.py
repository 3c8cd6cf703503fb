"""Clips are centred: what signer and background add to every frame of a clip does not reach the words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.models import HierarchicalVisualEncoder
from pipeline.models.frame_level import normalise
from pipeline.models.registry import build_visual
from tests.unit.pipeline.models.tiny import PIXELS, clips, shake, visual_config

LENGTHS = (6, 1, 9)


def encoder(centre: bool = True) -> HierarchicalVisualEncoder:
    built = build_visual(visual_config(centre_clips=centre), PIXELS, torch.float32)
    shake(built)
    return built.eval()


def with_constants(model: HierarchicalVisualEncoder, frames_NHWC: Tensor, lengths_B: Tensor) -> list[Tensor]:
    """Words and sentences when every clip's projected features are moved by a constant of its own."""
    constants_BD = 3 * torch.randn(len(lengths_B), 32, generator=torch.Generator().manual_seed(5))
    moved = constants_BD.repeat_interleave(lengths_B, dim=0)
    hook = model.frame_projection.register_forward_hook(lambda module, inputs, output: output + moved)
    try:
        output = model(frames_NHWC, lengths_B)
    finally:
        hook.remove()
    return [output.frames_ND, output.words_MD, output.sentence_BD]


@torch.no_grad()
def test_a_constant_over_a_clip_changes_nothing() -> None:
    model, (frames_NHWC, lengths_B) = encoder(), clips(6, 4, 9)
    plain = model(frames_NHWC, lengths_B)
    expected = [plain.frames_ND, plain.words_MD, plain.sentence_BD]
    for found, value in zip(with_constants(model, frames_NHWC, lengths_B), expected, strict=True):
        torch.testing.assert_close(found, value, atol=1e-4, rtol=0)
    off = encoder(centre=False)
    assert not torch.allclose(
        with_constants(off, frames_NHWC, lengths_B)[1], off(frames_NHWC, lengths_B).words_MD, atol=0.1
    ), "without centring the constant is seen"


@torch.no_grad()
def test_frame_features_by_hand_and_a_clip_of_one_frame_keeps_its_own() -> None:
    model, (frames_NHWC, lengths_B) = encoder(), clips(*LENGTHS)
    pixels = normalise(frames_NHWC, model.config.image_mean, model.config.image_std, torch.float32)
    features = model.frame_projection(model.backbone(pixels)).split(list(LENGTHS))
    frames = model(frames_NHWC, lengths_B).frames_ND.split(list(LENGTHS))
    for found, own in zip(frames, features, strict=True):
        expected = model.frame_norm(own - own.mean(0) if len(own) > 1 else own)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert frames[1].std() > 0.5, "centring a single frame would leave nothing of it"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_still_clips_stay_as_different_as_without_centring(dtype: torch.dtype) -> None:
    """Two pictures, each shown for eight frames; beside a clip that moves they are no different."""
    pictures, (moving_NHWC, _) = clips(1, 1, seed=3)[0], clips(8, seed=4)
    frames_NHWC = torch.cat([pictures.repeat_interleave(8, dim=0), moving_NHWC])
    model = encoder().to(dtype)
    centred = model(frames_NHWC, torch.tensor([8, 8, 8]))
    model.config.centre_clips = False
    plain = model(frames_NHWC, torch.tensor([8, 8, 8]))
    torch.testing.assert_close(centred.sentence_BD[:2], plain.sentence_BD[:2])
    distance = (plain.sentence_BD[0] - plain.sentence_BD[1]).norm()
    assert distance > 0.01 and not torch.allclose(centred.sentence_BD[2], plain.sentence_BD[2], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("others", [(1, 1), (30,), (2, 17, 5)])
def test_the_mean_is_over_a_clips_own_frames(others: tuple[int, ...]) -> None:
    model, (own_NHWC, _) = encoder(), clips(7)
    other_NHWC, other_B = clips(*others, seed=1)
    alone = model(own_NHWC, torch.tensor([7]))
    together = model(torch.cat([other_NHWC, own_NHWC]), torch.cat([other_B, torch.tensor([7])]))
    torch.testing.assert_close(together.words_MD[-2:], alone.words_MD, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.sentence_BD[-1], alone.sentence_BD[0], atol=1e-5, rtol=0)
