"""Inputs that exist but do not fit each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import fit
from pipeline.config.fit import fingerprint_of_files, tokenizer_fingerprint, vocabulary_problem
from pipeline.config.inputs import check_inputs
from pipeline.config.load import load
from tests.unit.pipeline.config.recipes import CONNECTOR, CONTRASTIVE, PRETRAINING, write
from tests.unit.pipeline.config.test_inputs import make_set, make_tokenizer, refused, world

__all__ = ["world"]
OPENPOSE = {"kind": "pose", "layout": "openpose", "fingerprint": "p", "width": 9}
BACKBONE = "model.visual={backbone: {path: models/backbone, train: frozen, pool: cls_mean}}"


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings(world: Path) -> None:
    make_tokenizer(world / "models" / "llm", 6)
    text = "the model's embedding table has 4 rows, its tokenizer makes 6 ids; use the tokenizer that belongs to"
    assert refused(CONNECTOR) == [
        f"recipe.yaml:6: model.llm.path=models/llm: {text} the model, or enlarge the table"
        " (`resize_token_embeddings` in transformers)"
    ]
    make_tokenizer(world / "models" / "tokenizer", 5)
    assert (
        "model.llm.path=models/llm with model.llm.tokenizer=models/tokenizer: the model's"
        in (refused(CONNECTOR, "model.llm.tokenizer=models/tokenizer")[0])
    )
    make_tokenizer(world / "models" / "text", 6)
    assert "model.text_encoder.path=models/text: the model's embedding table has 5 rows" in refused(CONTRASTIVE)[0]
    rewrite(world / "models" / "text" / "config.json", text_config={"vocab_size": 6})
    check_inputs(load(write(world, CONTRASTIVE)))


def test_control_tokens_beyond_the_table_matter_only_if_texts_are_made_with_them(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 4)
    (tmp_path / "config.json").write_text('{"vocab_size": 4}')
    image = {"id": 9, "content": "<image>", "special": True}
    rewrite(tmp_path / "tokenizer.json", added_tokens=[image])
    assert not vocabulary_problem(tmp_path, tmp_path)
    rewrite(tmp_path / "tokenizer_config.json", pad_token={"content": "<image>"})
    assert "has 4 rows, its tokenizer makes 10 ids" in vocabulary_problem(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not vocabulary_problem(tmp_path, tmp_path), "the config does not say"


def test_heads_that_sequence_parallel_ranks_cannot_share(world: Path) -> None:
    sets = ["model.llm={path: models/llm}", "train.sequence_parallel=3", "train.world_sizes=[3]"]
    assert (
        "model.llm.path=models/llm: 4 attention heads and 4 key heads cannot be shared by train.seq"
        in (refused(PRETRAINING, *sets, "data.block_tokens=255")[0])
    )


def test_shards_of_another_tokenizer(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit.subprocess, "run", lambda *a, **k: pytest.fail("the files say it already"))
    check_inputs(load(write(world, PRETRAINING)))
    monkeypatch.undo()
    monkeypatch.chdir(world)
    made = fingerprint_of_files(world / "models" / "tokenizer")
    make_tokenizer(world / "models" / "tokenizer", 3)
    found = tokenizer_fingerprint(world / "models" / "tokenizer")
    assert refused(PRETRAINING) == [
        f"recipe.yaml:10: data.train.0.shards was tokenised with another tokenizer (fingerprint {made[:16]}) than"
        f" model.llm uses (models/tokenizer, {found[:16]}); rebuild the shards with `slt shards build text --tokenizer"
        " models/tokenizer`"
    ]


def test_a_tokenizer_that_nobody_can_judge_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "9"}')
    assert fingerprint_of_files(tmp_path) == ""
    monkeypatch.setattr(fit.sys, "executable", "/bin/false")
    assert tokenizer_fingerprint(tmp_path, {"abc"}) == "", "no transformers here: left to the ranks"
    monkeypatch.setattr(fit, "_SECONDS", 0.01)
    monkeypatch.setattr(fit.sys, "executable", "/bin/cat")
    monkeypatch.setattr(fit, "_FINGERPRINT", "/dev/tty")
    assert tokenizer_fingerprint(tmp_path) == ""


def test_an_exported_encoder(world: Path) -> None:
    config = world / "models" / "visual" / "config.json"
    rewrite(config, image_pixels=96, max_frames=100)
    assert refused(CONNECTOR) == [
        "recipe.yaml:9: data.image_pixels=64, but the encoder in models/visual was trained on 96; set it to 96",
        "recipe.yaml:9: data.max_frames=256 is more than the 100 frames that models/visual takes; lower it to 100",
    ]
    rewrite(config, model_type="vit")
    assert refused(CONNECTOR) == [
        "recipe.yaml:8: model.visual.path=models/visual holds a 'vit' model, not a visual encoder; export the"
        " contrastive stage, or name a frame backbone under model.visual.backbone.path"
    ]


def test_stored_features(world: Path) -> None:
    backbone = world / "models" / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_text('{"vision_config": {"hidden_size": 8}}')
    (backbone / "model.safetensors").touch()
    features = {"fingerprint": "f", "width": 16, "pool": "cls_mean", "image_pixels": 64}
    make_set(world / "features", "features", features=features)
    sets = [BACKBONE, "data.train.0.shards=features"]
    check_inputs(load(write(world, CONTRASTIVE), sets))
    assert refused(CONTRASTIVE, *sets, "model.visual.backbone.pool=mean", "data.image_pixels=80") == [
        "--set data.train.0.shards=features: data.train.0.shards holds frame features of another backbone or"
        " preprocessing (image_pixels 64, the model's is 80, pool cls_mean, the model's is mean, width 16, the model's"
        " is 8); use the video shards, or extract them again: `slt shards features SHARDS --recipe RECIPE --out DIR`"
    ]
    trains = "model.visual.backbone.train lets the backbone change; set it to frozen, or train on the video shards"
    assert trains in refused(CONTRASTIVE, *sets, "model.visual.backbone.train=full")[0]
    assert trains in refused(CONTRASTIVE, "data.train.0.shards=features")[0], "random weights"
    export = world / "models" / "visual" / "config.json"
    rewrite(export, backbone_fingerprint="other", pool="cls", backbone_config={"hidden_sizes": [4, 16]})
    assert (
        "(fingerprint f, the model's is other, pool cls_mean, the model's is cls)"
        in (refused(CONNECTOR, "data.train.0.shards=features")[0])
    )
    mixed = "data.train=[{shards: shards/video}, {shards: features}]"
    assert (
        "data.train mixes videos and stored features (data.train.0 holds video, data.train.1 holds features)"
        in (refused(CONTRASTIVE, BACKBONE, mixed)[0])
    )


def test_rows_of_other_programs(world: Path) -> None:
    made = {"kind": "i3d", "fingerprint": "bsl5k", "width": 8}
    make_set(world / "i3d", "features", features=made)
    make_set(
        world / "pose", "features", features={"kind": "pose", "layout": "openpose", "fingerprint": "p", "width": 9}
    )
    features = "model.visual={features: {fingerprint: bsl5k, width: 8}}"
    pose = "model.visual={pose: {layout: openpose}}"
    for visual, shards in ((features, "i3d"), (pose, "pose")):
        check_inputs(load(write(world, CONTRASTIVE), [visual, f"data.train.0.shards={shards}"]))
    other = "build them with the layout or the fingerprint that the recipe names, or change the recipe"
    sets = ["model.visual={features: {fingerprint: mine, width: 4}}", "data.train.0.shards=i3d"]
    assert refused(CONTRASTIVE, *sets) == [
        "--set data.train.0.shards=i3d: data.train.0.shards holds other rows than the model reads (width 8, the model's"
        f" is 4, fingerprint bsl5k, the model's is mine); {other}"
    ]
    sets = ["model.visual={pose: {layout: mediapipe}}", "data.train.0.shards=pose"]
    assert f"(layout openpose, the model's is mediapipe); {other}" in refused(CONTRASTIVE, *sets)[0]
    assert "(layout not said, the model's is openpose)" in refused(CONTRASTIVE, pose, "data.train.0.shards=i3d")[0]
    assert (
        "data.train.0.shards holds videos, but model.visual has no backbone: it reads stored features or keypoints;"
        " name shards that were built with --rows" in refused(CONTRASTIVE, pose)[0]
    )


def test_exported_encoders_of_rows(world: Path) -> None:
    export = world / "models" / "visual" / "config.json"
    make_set(
        world / "pose", "features", features={"kind": "pose", "layout": "openpose", "fingerprint": "p", "width": 9}
    )
    rewrite(export, pose_layout="openpose", pose_fingerprint="p", backbone_config=None)
    check_inputs(load(write(world, CONNECTOR), ["data.train.0.shards=pose"]))
    rewrite(export, pose_fingerprint="q")
    assert "(fingerprint p, the model's is q)" in refused(CONNECTOR, "data.train.0.shards=pose")[0]
    rewrite(export, pose_layout="", features_width=8, backbone_fingerprint="bsl5k")
    assert "(width 9, the model's is 8, fingerprint p," in refused(CONNECTOR, "data.train.0.shards=pose")[0]
