"""Video models as backbones: windows of every clip, the step of every frame, the same features in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from pipeline.config.schema import BackboneConfig, VisualConfig
from pipeline.errors import RecipeError
from pipeline.inference.extract_features import extract
from pipeline.models.clip_layout import ClipLayout, ClipSizes
from pipeline.models.frame_level import new_backbone
from pipeline.models.registry import build_visual
from pipeline.models.visual import HierarchicalVisualEncoder
from shards.build.features import FeatureOptions
from tests.unit.pipeline.config.recipes import CONTRASTIVE, write
from tests.unit.pipeline.models.tiny import PIXELS, visual_config

SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 16,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "videomae": {**SIZES, "image_size": PIXELS, "num_frames": 4, "tubelet_size": 2},
    "timesformer": {**SIZES, "image_size": PIXELS, "num_frames": 4},
    "vivit": {**SIZES, "image_size": PIXELS, "num_frames": 4, "tubelet_size": [2, 16, 16]},
    "vjepa2": {
        **SIZES, "crop_size": PIXELS, "frames_per_clip": 4, "tubelet_size": 2, "pred_hidden_size": 24,
        "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "num_attention_heads": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("video") / str(request.param)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **MODELS[request.param])
    new_backbone(config).save_pretrained(made)
    return made


def build(folder: Path, stride: int = 0, **changes: Any) -> HierarchicalVisualEncoder:
    torch.manual_seed(1)
    settings = {"path": str(folder), "kind": "video", "pool": "mean", "window_stride": stride, **changes}
    return build_visual(visual_config(backbone=BackboneConfig(**settings)), PIXELS, torch.float32).eval()


def frames(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, PIXELS, PIXELS, 3), generator=generator, dtype=torch.uint8)


def test_windows_of_clips() -> None:
    layout = ClipLayout.of([6, 3], ClipSizes(4, 2, 16, 4, 4))
    assert layout.clip_frames_GF is not None and layout.clip_slots_N is not None
    assert layout.clip_frames_GF.tolist() == [[0, 1, 2, 3], [4, 5, 5, 5], [6, 7, 8, 8]]
    assert layout.clip_slots_N.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    layout = ClipLayout.of([6], ClipSizes(4, 2, 16, 4, 2))
    assert layout.clip_frames_GF is not None and layout.clip_slots_N is not None
    assert layout.clip_frames_GF.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]
    chosen = layout.clip_frames_GF.flatten()[layout.clip_slots_N]
    assert chosen.tolist() == list(range(6))
    assert (layout.clip_slots_N // 4).tolist() == [0, 0, 0, 1, 1, 1]
    assert ClipLayout.of([6], ClipSizes(4, 2, 16)).clip_frames_GF is None


@pytest.mark.parametrize("stride", [0, 2])
def test_a_clip_alone_gives_what_it_gives_in_a_batch(folder: Path, stride: int) -> None:
    encoder = build(folder, stride)
    together = torch.cat((frames(7), frames(5, seed=1)))
    with torch.no_grad():
        batch = encoder(together, torch.tensor([7, 5]))
        alone = encoder(frames(5, seed=1), torch.tensor([5]))
    torch.testing.assert_close(batch.words_MD[2:], alone.words_MD)
    assert batch.pooled_NP.shape == (12, 24)


def test_frames_of_one_step_share_its_token(folder: Path) -> None:
    encoder = build(folder)
    video = frames(8)
    changed = video.clone()
    changed[5:] = 255 - changed[5:]
    with torch.no_grad():
        first, second = (encoder(clip, torch.tensor([8])).pooled_NP for clip in (video, changed))
    assert torch.equal(first[:4], second[:4]), "another window"
    assert not torch.allclose(first[4:], second[4:])
    steps = 4 // encoder.backbone.tubelet
    kept = first.unflatten(0, (2, steps, -1))
    assert torch.equal(kept[:, :, :1].expand_as(kept), kept)


def test_steps_are_means_over_their_own_patches(folder: Path) -> None:
    """Against the model called by hand: tokens of a step are those whose time differs, whatever their order."""
    encoder = build(folder)
    backbone = encoder.backbone
    pixels = torch.rand(1, 4, 3, PIXELS, PIXELS)
    options = {backbone.family.argument: pixels}
    options |= {"skip_predictor": True} if backbone.family.unused else {}
    with torch.no_grad():
        tokens = backbone.model(**options).last_hidden_state[0, backbone.family.prefix :]
        steps, patches = 4 // backbone.tubelet, (PIXELS // 16) ** 2
        assert len(tokens) == steps * patches
        grid = tokens.view(steps, patches, -1) if backbone.family.steps_first else tokens.view(patches, steps, -1)
        by_hand = grid.mean(1 if backbone.family.steps_first else 0)
        torch.testing.assert_close(backbone(pixels)[0, :: backbone.tubelet], by_hand)


def test_windows_in_passes(folder: Path) -> None:
    whole, parts = build(folder), build(folder, frames_per_pass=4)
    with torch.no_grad():
        outputs = [encoder(frames(9), torch.tensor([9])).words_MD for encoder in (whole, parts)]
    torch.testing.assert_close(*outputs)


def test_every_weight_learns_and_an_export_computes_the_same(folder: Path, tmp_path: Path) -> None:
    encoder = build(folder).train()
    output = encoder(frames(6), torch.tensor([6]))
    (output.words_MD.square().sum() + output.sentence_BD.square().sum()).backward()
    assert not [name for name, weight in encoder.named_parameters() if weight.grad is None]
    encoder.eval().save_pretrained(tmp_path)
    again = build_visual(VisualConfig(path=str(tmp_path)), PIXELS, torch.float32).eval()
    with torch.no_grad():
        expected = encoder(frames(6), torch.tensor([6])).words_MD
        assert torch.equal(again(frames(6), torch.tensor([6])).words_MD, expected)


def test_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    backbone = {"path": str(folder), "kind": "video", "pool": "mean"}
    with pytest.raises(RecipeError, match=r"data\.image_pixels: 64, but the video model reads images of 32; set that"):
        build_visual(visual_config(backbone=BackboneConfig(**backbone)), 64, torch.float32)
    with pytest.raises(RecipeError, match=r"pool: 'cls' with kind video, whose steps have only a mean"):
        build(folder, pool="cls")
    recipe = CONTRASTIVE.replace(
        "tiny: {width: 96, heads: 3, patch_pixels: 16}",
        f"path: {folder}\n      kind: video\n      pool: mean\n      train: frozen",
    ).replace("data:\n", f"data:\n  image_pixels: {PIXELS}\n")
    with pytest.raises(RecipeError, match=r"features of a video model depend on the frames it reads together"):
        extract(write(tmp_path, recipe), [], tmp_path, tmp_path / "out", FeatureOptions())


def test_image_models_are_no_video_models(tmp_path: Path) -> None:
    config = AutoConfig.for_model("vit", **SIZES, image_size=PIXELS)
    new_backbone(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"kind video cannot read 'vit' models; it knows videomae, vivit"):
        build(tmp_path)
