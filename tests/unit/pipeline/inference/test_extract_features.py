"""Frame features of a recipe's frozen backbone: extraction, and training batches that hold them instead of frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from launch.slt import app
from pipeline.config.augment_schema import AugmentConfig
from pipeline.config.schema import BackboneConfig
from pipeline.errors import RecipeError
from pipeline.inference.augment import Augment, check_augment
from pipeline.inference.clips import FetchFrames, holds_features, pack_clips
from pipeline.inference.extract_features import extract
from pipeline.models.frame_level import new_backbone
from pipeline.models.registry import build_visual
from pipeline.models.visual import HierarchicalVisualEncoder
from pipeline.stages.video import check_features, check_passes
from shards.build.build import BuildOptions, build
from shards.build.features import FeatureOptions
from shards.errors import DataError
from shards.format.index import read_index
from shards.load.features import read_views
from shards.load.reader import Reader
from shards.order.items import SHOWN_ELEMENT
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from tests.unit.pipeline.config.recipes import CONTRASTIVE, PRETRAINING, write
from tests.unit.pipeline.models.tiny import PIXELS, visual_config
from tests.unit.shards.making import video_corpus

VIT = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": PIXELS, "patch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``videos``, a pretrained ``vit``, ``recipe.yaml`` naming it, and its ``features``."""
    folder = tmp_path_factory.mktemp("features")
    build(video_corpus(folder / "source", 5), folder / "videos", BuildOptions())
    torch.manual_seed(0)
    new_backbone(AutoConfig.for_model("vit", **VIT)).save_pretrained(folder / "vit")
    backbone = f"path: {folder / 'vit'}\n      train: frozen"
    text = CONTRASTIVE.replace("tiny: {width: 96, heads: 3, patch_pixels: 16}", backbone)
    text = text.replace("data:\n", f"data:\n  image_pixels: {PIXELS}\n")
    recipe = write(folder, text)
    extract(recipe, [], folder / "videos", folder / "features", FeatureOptions())
    return folder


def plan(folder: Path) -> Plan:
    return Plan([Source(read_index(folder))], PlanOptions("clip", shuffle=False))


def encoder(world: Path, train: str = "frozen", pool: str = "cls") -> HierarchicalVisualEncoder:
    backbone = BackboneConfig(path=str(world / "vit"), train=train, pool=pool)
    torch.manual_seed(1)
    return build_visual(visual_config(backbone=backbone), PIXELS, torch.float32).eval()


def test_batches_of_features_give_what_batches_of_frames_give(world: Path) -> None:
    fetch = FetchFrames(max_frames=6, frame_stride=1, image_pixels=PIXELS)
    model, outputs = encoder(world), []
    for name in ("videos", "features"):
        reader = Reader(plan(world / name))
        assert holds_features(reader.plan) == (name == "features")
        items = [reader.plan.epoch(0).item(number) for number in range(5)]
        batch = pack_clips([fetch(reader, item) for item in items], model.config.clip_sizes())
        assert batch["frame_lengths_B"].tolist() == [6] * 5 and len(batch["rows"]) == 5
        with torch.no_grad():
            outputs.append(model(batch["frames_NHWC"], layout=batch["layout"]))
    # Random weights hardly tell frames apart, and clips are centred: what float16 rounds away weighs more than usual.
    torch.testing.assert_close(outputs[0].words_MD, outputs[1].words_MD, atol=3e-2, rtol=0)
    torch.testing.assert_close(outputs[0].sentence_BD, outputs[1].sentence_BD, atol=3e-2, rtol=0)


AUGMENT = ["data.augment.crop_area=[0.3, 0.6]", "data.augment.flip=0.5", "data.augment.speed=[0.8, 1.2]"]


def test_views_are_features_of_augmented_clips_and_each_has_its_turn(world: Path, tmp_path: Path) -> None:
    extract(world / "recipe.yaml", AUGMENT, world / "videos", tmp_path / "out", FeatureOptions(views=3))
    augment = Augment(AugmentConfig(crop_area=(0.3, 0.6), flip=0.5), seed=0)
    reader, frames = Reader(plan(tmp_path / "out")), Reader(plan(world / "videos"))
    model = encoder(world)
    views_KTP = read_views(reader, 2)
    for view in (1, 2):
        shown = frames.decoded(2, None, PIXELS, augment.placement(2, view))
        with torch.no_grad():
            expected = model.pooled(torch.from_numpy(augment.picture(shown, 2, view)))
        torch.testing.assert_close(torch.tensor(views_KTP[view]).float(), expected, atol=1e-2, rtol=0)
    plain = FetchFrames(64, 1, PIXELS)(reader, reader.plan.epoch(0).item(2))[0][0]
    assert (plain == views_KTP[0]).all(), "evaluation sees the clip as it is"
    fetch = FetchFrames(64, 1, PIXELS, augment)
    items = [np.array([(2, 0, 0, showing)], SHOWN_ELEMENT) for showing in range(6)]
    shown = [[(fetch(reader, item)[0][0] == view).all() for view in views_KTP].index(True) for item in items]
    assert sorted(shown[:3]) == sorted(shown[3:]) == [0, 1, 2]
    no_pictures = FetchFrames(64, 1, PIXELS, Augment(AugmentConfig(drop_frames=0.5), seed=0))
    found = no_pictures(reader, items[1])[0][0]
    assert len(found) < len(plain) and all((plain == row).all(axis=1).any() for row in found)


def test_features_made_without_the_augmentations_of_the_recipe_are_refused(world: Path, tmp_path: Path) -> None:
    extract(world / "recipe.yaml", AUGMENT, world / "videos", tmp_path / "out", FeatureOptions(views=2))
    views, videos, plain = plan(tmp_path / "out"), plan(world / "videos"), plan(world / "features")
    config = AugmentConfig(crop_area=(0.3, 0.6), flip=0.5, drop_frames=0.1)
    check_augment(views, config)
    check_augment(videos, config)
    check_augment(plain, AugmentConfig(drop_frames=0.1))
    with pytest.raises(RecipeError, match=r"of clips as they are, but data.augment asks for {.*'flip': 0.5}. Extract"):
        check_augment(plain, config)
    with pytest.raises(RecipeError, match=r"their views made with {'crop_area': \[0.3, 0.6\], 'flip': 0.5}, but"):
        check_augment(views, AugmentConfig(flip=0.5))


def test_views_that_would_be_equal_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"4 views of every clip are asked for, but data.augment changes no picture"):
        extract(world / "recipe.yaml", AUGMENT[2:], world / "videos", tmp_path / "out", FeatureOptions(views=4))


def test_features_of_another_backbone_or_of_one_that_trains_are_refused(world: Path) -> None:
    features = plan(world / "features")
    check_features(features, encoder(world))
    check_features(plan(world / "videos"), encoder(world, train="full"))
    with pytest.raises(RecipeError, match=r"lets the backbone change; set it to frozen"):
        check_features(features, encoder(world, train="full"))
    with pytest.raises(RecipeError, match=r"of another backbone or preprocessing .*'pool': 'cls'"):
        check_features(features, encoder(world, pool="mean"))


def test_ranks_that_would_call_a_sharded_backbone_differently_often_are_refused(world: Path) -> None:
    passes = encoder(world)
    passes.config.frames_per_pass = 4
    for plan_of, built, zero_stage in (("videos", passes, 2), ("features", passes, 3), ("videos", encoder(world), 3)):
        check_passes(plan(world / plan_of), built, zero_stage)
    with pytest.raises(RecipeError, match=r"frames_per_pass: 4 with ZeRO stage 3: .*zero_optimization.stage to 2"):
        check_passes(plan(world / "videos"), passes, 3)


@pytest.mark.parametrize("stored", [None, {"width": 4}])
def test_features_of_an_unknown_backbone_are_refused(world: Path, stored: dict[str, int] | None) -> None:
    features = plan(world / "features")
    features.sources[0].shard_set.manifest.options = {"adopted": True} | ({"features": stored} if stored else {})
    with pytest.raises(
        RecipeError, match=r"manifest\.json lacks options\.features\.fingerprint: it does not say which"
    ):
        check_features(features, encoder(world))


def test_videos_and_features_do_not_mix(world: Path) -> None:
    sources = [Source(read_index(world / name)) for name in ("videos", "features")]
    with pytest.raises(DataError, match="videos and stored features in one plan"):
        Plan(sources, PlanOptions("clip"))


def test_recipes_without_a_frozen_pretrained_backbone(world: Path, tmp_path: Path) -> None:
    for text, words in ((CONTRASTIVE, r"must be pretrained \(path\) and frozen"), (PRETRAINING, "no model.visual")):
        with pytest.raises(RecipeError, match=words):
            extract(write(tmp_path, text), [], world / "videos", tmp_path / "out", FeatureOptions())
    assert not (tmp_path / "out").exists()


def test_the_command(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "thin"
    words = ["shards", "features", str(world / "videos"), "--recipe", str(world / "recipe.yaml"), "--out", str(out)]
    result = CliRunner().invoke(app, [*words, "--frame-stride", "2"])
    assert result.exit_code == 0, result.output
    assert "5 samples" in result.output and "'width': 24" in result.output
    assert read_index(out).row(0).frames == 5
