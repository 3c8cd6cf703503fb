"""Windows of a long video give the word tokens of the whole, and the halo is exactly what they need."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import RecipeError
from pipeline.inference.long_words import grid_frames, halo_frames, long_words, pooled_frames
from pipeline.models import HierarchicalVisualEncoder
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.registry import build_visual
from tests.unit.pipeline.models.tiny import PIXELS, clips, shake, visual_config


def encoder_of(layers: int, window: int, stride: int, centre: bool) -> HierarchicalVisualEncoder:
    base = visual_config()
    word = base.word.model_copy(update={"layers": layers, "window_frames": window, "stride": stride})
    built = build_visual(
        base.model_copy(update={"word": word, "centre_clips": centre, "max_frames": 512}), PIXELS, torch.float64
    )
    shake(built)
    return built.eval()


@torch.inference_mode()
def whole(encoder: HierarchicalVisualEncoder, pooled_TP: torch.Tensor) -> torch.Tensor:
    return encoder(pooled_TP, torch.tensor([len(pooled_TP)]), sentences=False).words_MD


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(("layers", "window", "stride"), [(1, 8, 4), (2, 8, 4), (3, 5, 2), (4, 6, 3), (2, 4, 4)])
def test_windows_equal_the_whole(layers: int, window: int, stride: int, centre: bool) -> None:
    encoder = encoder_of(layers, window, stride, centre)
    pooled_TP = torch.randn(
        301, encoder.frame_projection.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    expected_SD = whole(encoder, pooled_TP)
    grid, halo = grid_frames(encoder.config), halo_frames(encoder.config)
    least = -(-halo // grid) * grid + grid + halo
    for frames_at_once in (least, least + 37, 300):
        words_SD = long_words(encoder, pooled_TP, frames_at_once)
        torch.testing.assert_close(words_SD, expected_SD, atol=1e-6, rtol=0)  # rotary angles are float32


@pytest.mark.parametrize(("layers", "window", "stride"), [(1, 8, 4), (2, 8, 4), (3, 5, 2), (4, 6, 3)])
def test_the_halo_is_what_a_token_depends_on(layers: int, window: int, stride: int) -> None:
    """Neither a frame less nor a frame more, of a cell in the middle."""
    encoder = encoder_of(layers, window, stride, False)
    grid, halo = grid_frames(encoder.config), halo_frames(encoder.config)
    rows_ND = torch.randn(5 * grid, encoder.config.width, dtype=torch.float64, requires_grad=True)
    words_SD = encoder.word_level(rows_ND, ClipLayout.of([len(rows_ND)], encoder.config.clip_sizes()))
    cell = words_SD[2 * window : 3 * window]  # a grid cell holds as many word tokens as a window frames
    cell.square().sum().backward()
    assert rows_ND.grad is not None
    seen = rows_ND.grad.abs().sum(1).nonzero().flatten()
    assert (int(seen.min()), int(seen.max())) == (2 * grid - halo, 3 * grid + halo - 1)


def test_a_still_video_keeps_its_mean() -> None:
    encoder = encoder_of(2, 8, 4, True)
    one_P = torch.randn(encoder.frame_projection.in_features, dtype=torch.float64)
    pooled_TP = one_P.expand(120, -1)
    torch.testing.assert_close(long_words(encoder, pooled_TP, 90), whole(encoder, pooled_TP), atol=1e-10, rtol=0)


def test_features_of_pieces_are_those_of_the_whole() -> None:
    encoder = encoder_of(2, 8, 4, False)
    frames_NHWC, _ = clips(29)
    pooled_TP = pooled_frames(encoder, frames_NHWC.split(7))
    with torch.inference_mode():
        torch.testing.assert_close(pooled_TP, encoder.pooled(frames_NHWC), atol=1e-10, rtol=0)


@pytest.mark.parametrize("frames_at_once", [71, 513])
def test_too_few_or_too_many_frames_at_once(frames_at_once: int) -> None:
    encoder = encoder_of(2, 8, 4, False)
    message = (
        rf"frames_at_once {frames_at_once}: this encoder needs at least 72 \(a cell of 32 and a halo of 8 frames\)"
    )
    with pytest.raises(RecipeError, match=message):
        long_words(encoder, torch.zeros(200, encoder.frame_projection.in_features), frames_at_once)


def test_keypoints_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(2, 8, 4, False)
    monkeypatch.setattr(encoder.config, "pose_layout", "openpose")
    with pytest.raises(RecipeError, match="long_words takes features of frames alone"):
        long_words(encoder, torch.zeros(200, 24), 90)
    monkeypatch.setattr(encoder.config, "clip_stride", 2)
    with pytest.raises(RecipeError, match="long_words takes features of single frames; this encoder's backbone reads"):
        pooled_frames(encoder, [])
