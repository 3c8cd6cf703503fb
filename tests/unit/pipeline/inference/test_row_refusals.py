"""Models and shard sets of keypoints and features that do not go together are refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.slt import app
from pipeline.errors import CheckpointError, RecipeError
from pipeline.inference import extract_features
from pipeline.inference.clips import check_poses, check_rows
from pipeline.inference.rows import ROWS_FORM, read_row_forms
from pipeline.inference.translate import Translator
from shards.build.features import FeatureOptions
from shards.schema import VideoFile


def plan(kind: str, **features: Any) -> Any:
    manifest = SimpleNamespace(kind=kind, options={"features": features})
    return SimpleNamespace(sources=[SimpleNamespace(shard_set=SimpleNamespace(manifest=manifest, dir="data/x"))])


def encoder(**settings: Any) -> Any:
    known = {"backbone_config": {}, "reads_frames": True, "pose_layout": "", "pose_fingerprint": ""}
    return SimpleNamespace(**{**known, "rows_fingerprint": "f", **settings})


@pytest.mark.parametrize(
    ("config", "reads"),
    [(encoder(backbone_config=None), "stored features"),
     (encoder(backbone_config=None, reads_frames=False, pose_layout="openpose"), "keypoints of the layout openpose")],
)  # fmt: skip
def test_videos_for_an_encoder_without_backbone(config: Any, reads: str) -> None:
    with pytest.raises(RecipeError, match=f"data/x: these shards hold videos, but the model has no backbone.*{reads}"):
        check_rows(plan("video"), config)
    check_rows(plan("video"), encoder())


def test_keypoints_beside_frames_that_lack_are_too_much_or_of_another_layout() -> None:
    fused = encoder(pose_layout="openpose", pose_fingerprint="p")
    with pytest.raises(RecipeError, match=r"reads keypoints beside frames, but none are given; give --pose \(docs"):
        check_poses(None, fused, "give --pose")
    poses = plan("features", fingerprint="p")
    with pytest.raises(RecipeError, match="does not read keypoints beside frames; leave them out, or train an encoder"):
        check_poses(poses, encoder(), "give --pose")
    check_poses(poses, fused, "give --pose")
    other = plan("features", fingerprint="q")
    with pytest.raises(RecipeError, match=r"data/x: these shards hold .* layout openpose \(fingerprint p"):
        check_poses(other, fused, "give --pose")


def test_features_of_an_encoder_without_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        extract_features, "build_visual", lambda *_: SimpleNamespace(config=encoder(backbone_config=None))
    )
    with pytest.raises(RecipeError, match="has no backbone; it reads rows that are stored already"):
        extract_features.extract("demo_contrastive", [], tmp_path, tmp_path / "out", FeatureOptions())  # type: ignore[arg-type]


def test_features_of_an_encoder_that_is_loaded_over(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.init_from gives the encoder other weights.*name that export as"):
        extract_features.extract(
            "demo_contrastive", ["model.init_from.visual=runs/x/export"], tmp_path, tmp_path / "out", FeatureOptions()
        )  # type: ignore[arg-type]


def test_an_export_whose_form_of_rows_is_gone_or_damaged(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(visual=SimpleNamespace(config=encoder(backbone_config=None)))
    with pytest.raises(CheckpointError, match=f"the model reads stored rows, but has no {ROWS_FORM}; export the run"):
        Translator(model, None, None)  # type: ignore[arg-type]
    (tmp_path / ROWS_FORM).write_text("{half")
    with pytest.raises(CheckpointError, match=r"does not say how rows are read \(.*\); export the run again"):
        read_row_forms(tmp_path)


@pytest.mark.parametrize(("fused", "poses", "what"), [
    (False, [Path("a.npy")], "1 files of keypoints for 1 clips, but the model does not read keypoints beside frames"),
    (True, [], "0 files of keypoints for 1 clips, but the model reads keypoints beside frames: give one file of them"),
])  # fmt: skip
def test_keypoints_of_files_to_translate(
    fused: bool, poses: list[Path], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    translator = Translator.__new__(Translator)
    translator.fused = fused
    monkeypatch.setattr(Translator, "check", lambda *_: None)
    with pytest.raises(RecipeError, match=what):
        translator.translate([VideoFile(Path("a.mp4"))], None, poses)


def test_one_file_of_keypoints_per_video() -> None:
    done = CliRunner().invoke(app, ["translate", "a.mp4", "b.mp4", "--model", "m", "--pose", "a.npy"])
    assert isinstance(done.exception, RecipeError)
    assert "1 times --pose for 2 videos: give one per video, in order" in str(done.exception)
