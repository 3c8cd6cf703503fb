"""Stage 2 with everything that glosses can teach, on real DeepSpeed processes: ranks, resume, error rate, export."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from launch.slt import app
from pipeline.engine.checkpoint import Checkpoint, latest_checkpoint
from pipeline.export.hf import export
from pipeline.models.gloss_vocabulary import GlossVocabulary
from shards.format.index import read_index
from tests.jobs import World, rows, run_job
from tests.multiproc.test_training import TO_ROUNDING, weights
from tests.unit.pipeline.evaluate.test_word_errors import by_recursion

pytestmark = pytest.mark.multiproc

SETTINGS = {
    "train__steps": 4, "train__checkpoint__every_steps": 2, "train__checkpoint__keep": 5,
    "contrastive__ctc": "{weight: 0.5, set_weight: 0.3, order: video, unusable: leave_out}",
    "contrastive__alignment": "{frame_weight: 0.4, segment_weight: 0.2}",
}  # fmt: skip
LOSSES = ("loss", "sentence_loss", "token_loss", "frame_loss", "segment_loss", "ctc_loss", "set_loss")


def newest(run_dir: Path) -> Checkpoint:
    found = latest_checkpoint(run_dir)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four uninterrupted steps on two ranks."""
    run_dir = tmp_path_factory.mktemp("glosses") / "whole"
    run_job("contrastive", world.sets("contrastive", run_dir, 2, **SETTINGS), 2)
    return run_dir


def test_one_big_batch_gives_the_same_losses(world: World, whole: Path, tmp_path: Path) -> None:
    """Two ranks, micro-batches of 2 and ZeRO-3 against one process with one micro-batch and no sharding."""
    big = {"train__micro_batch": 8, "deepspeed__overrides": "{zero_optimization: {stage: 0}}"}
    run_job("contrastive", world.sets("contrastive", tmp_path / "big", 1, **SETTINGS, **big), 1)
    for name in (*(f"train/{name}" for name in LOSSES), "train/gloss_left_out"):
        found = rows(tmp_path / "big", name)
        assert found == pytest.approx(rows(whole, name), rel=TO_ROUNDING) and len(found) == 4
    assert rows(tmp_path / "big", "train/grad_norm") == pytest.approx(
        rows(whole, "train/grad_norm"), rel=10 * TO_ROUNDING
    )


def test_a_resumed_run_is_bit_equal(world: World, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "resumed"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    output = run_job("contrastive", world.sets("contrastive", run_dir, 2, **SETTINGS), 2)
    assert "step-000002 at step 2" in output
    assert rows(run_dir) == rows(whole) and rows(run_dir, "eval/wer") == rows(whole, "eval/wer")
    assert weights(run_dir) == weights(whole)


def test_the_export_recognises_what_the_run_did(world: World, whole: Path, tmp_path: Path) -> None:
    """`export` proves the head's logits; the vocabulary is that of the training split."""
    folder = tmp_path / "export"
    export(whole, folder)
    heads = load_file(folder / "heads.safetensors")
    vocabulary = GlossVocabulary.load(folder)
    assert heads["gloss_head.weight"].shape[0] == len(vocabulary) and "frame_head.weight" in heads
    table = read_index(world.video).table
    train = [text for text, split in zip(table["gloss"].to_pylist(), table["split"].to_pylist(), strict=True)
             if split == "train"]  # fmt: skip
    assert vocabulary == GlossVocabulary.of(train)
    assert newest(whole).probe()["glosses_BSV"].shape[-1] == len(vocabulary)
    assert json.loads((folder / "glosses.json").read_text(encoding="utf-8"))["blank"] == 0

    command = ["recognise", str(folder), "--shards", str(world.video), "--split", "dev", "--micro-batch", "5"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    with (folder / "recognised" / "dev.tsv").open(encoding="utf-8") as file:
        pairs = [(row["hypothesis"].split(), row["reference"].split()) for row in csv.DictReader(file, delimiter="\t")]
    assert len(pairs) == list(table["split"].to_pylist()).count("dev")
    rate = 100 * sum(by_recursion(*map(tuple, pair)) for pair in pairs) / sum(len(own) for _, own in pairs)
    assert f"WER {rate:.2f} %" in result.stdout
    assert rows(whole, "eval/wer")[4] == pytest.approx(rate), "the run's own evaluation"
