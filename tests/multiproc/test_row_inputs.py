"""Keypoints and precomputed features from files to translations: shards, both stages, export, evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import CheckpointError, RecipeError
from pipeline.evaluate.run import EvaluateOptions, evaluate_export
from pipeline.export.hf import export
from pipeline.inference.generate import GenerationOptions
from pipeline.inference.long_video import LongVideo, translate_long
from pipeline.inference.rows import ROWS_FORM
from pipeline.inference.translate import Translator
from shards.build.build import BuildOptions, build
from shards.corpora.placed import Placed
from shards.corpora.synthetic import Synthetic, SyntheticOptions, generate
from shards.media.poses import PoseFiles
from shards.media.rows import FeatureFiles, RowsForm
from shards.media.video import VideoOptions
from shards.schema import VideoFile
from tests.jobs import TINY_VISUAL, World, rows, run_job

pytestmark = pytest.mark.multiproc

SIZES = TINY_VISUAL[TINY_VISUAL.index(" width: 32") : -1]
FEATURES = FeatureFiles("toy", "toy-1", 12, 12.5)
GREEDY = GenerationOptions(max_new_tokens=4)


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    form: RowsForm | None
    """None: videos."""
    folder: str
    suffix: str
    visual: str
    """`model.visual` without the sizes of the levels above."""
    beside: bool = False
    """Whether keypoints stand beside it."""


POSE = PoseFiles("synthetic", 12.5)
POSE_LEVEL = "pose: {layout: synthetic, width: 8}"
BACKBONE = "backbone: {tiny: {width: 24, layers: 1, heads: 2, feed_forward: 48, patch_pixels: 16}, pool: mean}"
KINDS = {
    "pose": Kind(POSE, "poses", ".npy", POSE_LEVEL),
    "features": Kind(FEATURES, "features", ".npy", "features: {fingerprint: toy-1, width: 12}"),
    "fused": Kind(None, "videos", ".mp4", f"{BACKBONE}, {POSE_LEVEL}", beside=True),
}


FOLDERS: dict[RowsForm, str] = {POSE: "poses", FEATURES: "features"}


def sources(kind: Kind, folder: Path) -> dict[str, object]:
    """`data.train` and `data.eval`."""
    shards = f"shards: {folder / 'shards'}" + (f", pose: {folder / 'pose-shards'}" if kind.beside else "")
    return {"data__train": f"[{{{shards}}}]", "data__eval": f"[{{{shards}, split: dev}}]"}


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus with keypoints, and features that are random numbers of them."""
    folder = tmp_path_factory.mktemp("signs") / "corpus"
    sizes = {"train": 16, "dev": 3, "test": 2, "test_signer": 1, "text_train": 40, "text_dev": 2, "size": 32}
    generate(folder, SyntheticOptions(**sizes, poses=True), 1)  # type: ignore[arg-type]
    mix = np.random.default_rng(0).normal(size=(60, FEATURES.width)) / 30
    (folder / "features").mkdir()
    for path in (folder / "poses").glob("*.npy"):
        np.save(folder / "features" / path.name, np.load(path)[..., :2].reshape(-1, 60) @ mix)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def trained(
    request: pytest.FixtureRequest, signs: Path, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Shards of a kind of input, and both stages trained on them and exported."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    placed = {form: Placed(Synthetic(signs), f"{signs}/{name}/{{id}}.npy") for form, name in FOLDERS.items()}
    videos = BuildOptions(video=VideoOptions(short_side=32, fps=12.5))
    if kind.form is None:
        build(Synthetic(signs), folder / "shards", videos, 1)
    else:
        build(placed[kind.form], folder / "shards", BuildOptions(rows=kind.form), 1)
    if kind.beside:
        build(placed[POSE], folder / "pose-shards", BuildOptions(rows=POSE), 1)
    data = {
        **sources(kind, folder), "train__eval_every_steps": 3, "train__steps": 6, "data__image_pixels": 32,
    }  # fmt: skip
    visual = {"model__visual": f"{{{kind.visual},{SIZES}}}"}
    run_job("contrastive", world.sets("contrastive", folder / "contrastive", 2, **data, **visual), 2)
    export(folder / "contrastive", folder / "encoder")
    encoder = {"model__visual__path": folder / "encoder"}
    run_job("connector", world.sets("connector", folder / "connector", 2, **data, **encoder), 2)
    export(folder / "connector", folder / "model")
    return folder


def test_from_files_to_translations(trained: Path, signs: Path) -> None:
    """Exports are compared with the live model while they are written; here they evaluate shards and files."""
    kind = next(kind for name, kind in KINDS.items() if trained.name.startswith(name))
    losses = rows(trained / "contrastive")
    assert losses[6] < losses[1]
    assert "eval/bleu4" in (trained / "connector" / "metrics.jsonl").read_text()
    poses = [trained / "pose-shards"] if kind.beside else []
    options = EvaluateOptions(split="test", generation=GREEDY, micro_batch=1, pose=poses)
    scores = evaluate_export(trained / "model", [trained / "shards"], trained / "scores", options)
    assert scores is not None and scores.samples == 2
    lines = (trained / "scores" / "predictions.tsv").read_text().splitlines()
    translator = Translator.from_export(trained / "model")
    file = signs / kind.folder / f"test-000000{kind.suffix}"
    beside = [signs / "poses" / "test-000000.npy"] if kind.beside else []
    (alone,) = translator.translate([VideoFile(file)], GREEDY, beside)
    assert alone.text in lines[1] and "test-000000" in lines[1]
    first = json.loads((signs / "segments.jsonl").read_text().splitlines()[19])
    assert (first["id"], alone.frames) == ("test-000000", -(-first["frames"] // 2))
    assert alone.duration_seconds == pytest.approx(first["frames"] / 12.5)
    (part,) = translator.translate([VideoFile(file, 0.4, 1.2)], GREEDY, beside)
    assert (part.frames, part.duration_seconds) == (5, pytest.approx(0.8))
    with pytest.raises(RecipeError, match=r"files of keypoints for 1 clips, but the model (reads|does not read)"):
        translator.translate([VideoFile(file)], GREEDY, [] if kind.beside else [file])
    with pytest.raises(RecipeError, match="this model reads keypoints or stored features, a long video holds"):
        next(translate_long(translator, LongVideo(file), GREEDY))


def test_models_refuse_what_they_do_not_read(trained: Path, signs: Path, world: World) -> None:
    kind = next(kind for name, kind in KINDS.items() if trained.name.startswith(name))
    options = EvaluateOptions(split="dev", generation=GREEDY)
    if kind.beside:
        with pytest.raises(RecipeError, match=r"reads keypoints beside frames, but none are given; name their shards"):
            evaluate_export(trained / "model", [trained / "shards"], trained / "refused", options)
        build(Placed(Synthetic(signs), f"{signs}/features/{{id}}.npy"), trained / "toy", BuildOptions(rows=FEATURES), 1)
        with pytest.raises(RecipeError, match=r"these shards hold .*'toy-1'.*reads keypoints of the layout synthetic"):
            evaluate_export(
                trained / "model", [trained / "shards"], trained / "no", replace(options, pose=[trained / "toy"])
            )
        return
    with pytest.raises(RecipeError, match=r"does not read keypoints beside frames; leave them out"):
        refused = replace(options, pose=[trained / "shards"])
        evaluate_export(trained / "model", [trained / "shards"], trained / "refused", refused)
    with pytest.raises(RecipeError, match=r"these shards hold videos, but the model has no backbone; it reads"):
        evaluate_export(trained / "model", [world.video], trained / "refused", options)
    form = trained / "model" / ROWS_FORM
    text = form.read_text()
    form.unlink()
    with pytest.raises(CheckpointError, match=r"the model reads stored rows, but has no rows_form\.json"):
        Translator.from_export(trained / "model")
    form.write_text('{"pose": {"kind": "pose"}}')
    with pytest.raises(CheckpointError, match=r"rows_form\.json does not say how rows are read \(KeyError"):
        Translator.from_export(trained / "model")
    form.write_text(text)
