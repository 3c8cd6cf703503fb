"""Evaluation of an exported folder: every sample once at any number of ranks, batch size and search option."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import CheckpointError, RecipeError
from pipeline.evaluate.metrics import Scores, score
from pipeline.evaluate.report import read_predictions
from pipeline.evaluate.run import CollatePrompts, EvalRanks, EvaluateOptions, FetchFrames, evaluate_export
from pipeline.inference.generate import GenerationOptions, translate, translate_batch
from pipeline.inference.load import load_export
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from shards.errors import DataError
from shards.exchange.adopt import adopt
from shards.format.index import read_index, write_index
from shards.format.text_columns import write_column
from shards.load.loader import EvalLoader
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from tests.unit.pipeline.exported import TEXTS
from tests.unit.shards.exchange.test_adopt import npy, write_tar
from tests.unit.shards.shard_sets import in_memory

FAST = GenerationOptions(num_beams=1, max_new_tokens=5)


def evaluate(export: Path, shards: Path, out: Path, ranks: int = 1, **options: object) -> Scores:
    """All ranks in one process, the first one last so that it finds the others' parts."""
    settings = EvaluateOptions(**{"generation": FAST, "micro_batch": 3, **options})  # type: ignore[arg-type]
    for rank in reversed(range(ranks)):
        scores = evaluate_export(export, [shards], out, settings, EvalRanks(rank, ranks))
        assert (scores is None) == (rank > 0)
    assert scores is not None
    return scores


def test_writes_what_it_scored(export_dir: Path, shard_dir: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = EvaluateOptions(generation=FAST, micro_batch=3, protocol="phoenix14t")
    scores = evaluate_export(export_dir, [shard_dir], tmp_path, options, on_progress=lambda *at: seen.append(at))
    assert scores is not None and (scores.samples, scores.protocol) == (7, "phoenix14t")
    assert seen == [(3, 7), (6, 7), (7, 7)]
    predictions = read_predictions(tmp_path / "predictions.parquet")
    assert [p.sample_id for p in predictions] == [f"clip/{number}" for number in range(7)]
    assert [p.reference for p in predictions] == TEXTS
    assert {(p.corpus, p.split, p.signer) for p in predictions} == {("tiny", "test", "s0"), ("tiny", "test", "s1")}
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["scores"]["bleu4"] == scores.bleu4 and content["generation"]["max_new_tokens"] == 5
    assert content["shards"] == {str(shard_dir): read_index(shard_dir).fingerprint}
    assert content["samples_in_split"] == 7 and content["known_texts"] is None


def test_sentences_that_the_language_model_has_read(
    export_dir: Path, shard_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = in_memory("text", [3, 3], text=["sun", "Rain in the north."])
    (texts := tmp_path / "texts").mkdir()
    write_index(texts, made.table, made.manifest)
    model = Path(shutil.copytree(export_dir, tmp_path / "model"))
    recipe = {"stage": "continued_pretraining", "data": {"train": [{"shards": str(texts)}]}}
    (model / "recipe.resolved.yaml").write_text(json.dumps(recipe))
    evaluate(model, shard_dir, tmp_path / "out")
    known = json.loads((tmp_path / "out" / "scores.json").read_text())["known_texts"]
    assert (known["samples"], known["known"]) == (7, 2) and "2 of 7 evaluation texts are among" in caplog.text


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 3), (3, 1), (9, 2)])
def test_any_number_of_ranks_gives_the_same_files(
    ranks: int, micro_batch: int, export_dir: Path, shard_dir: Path, tmp_path: Path
) -> None:
    alone = evaluate(export_dir, shard_dir, tmp_path / "one")
    together = evaluate(export_dir, shard_dir, tmp_path / "many", ranks, micro_batch=micro_batch)
    assert together == alone
    tables = [read_predictions(tmp_path / name / "predictions.parquet") for name in ("one", "many")]
    assert tables[0] == tables[1]


def test_text_columns_are_further_references(export_dir: Path, shard_dir: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(shard_dir, tmp_path / "shards"))
    alone = evaluate(export_dir, shards, tmp_path / "alone")
    hypotheses = [p.hypothesis for p in read_predictions(tmp_path / "alone" / "predictions.parquet")]
    said = [[text] if text.strip() else [] for text in hypotheses]
    write_column(read_index(shards), "said", said, {})
    write_column(read_index(shards), "nothing", [[] for _ in said], {})
    assert evaluate(export_dir, shards, tmp_path / "same", references="nothing") == alone
    together = evaluate(export_dir, shards, tmp_path / "more", 2, references="nothing,said")
    expected = [
        [p.reference, *own]
        for p, own in zip(read_predictions(tmp_path / "more" / "predictions.parquet"), said, strict=True)
    ]
    assert together == score(hypotheses, expected, "default") and together.chrf > alone.chrf
    assert json.loads((tmp_path / "more" / "scores.json").read_text())["references"] == "nothing,said"
    with pytest.raises(DataError, match="no text column 'missing'"):
        evaluate(export_dir, shards, tmp_path / "missing", references="missing")


def test_first_samples_only(export_dir: Path, shard_dir: Path, tmp_path: Path) -> None:
    scores = evaluate(export_dir, shard_dir, tmp_path, 2, max_samples=3, corpus="tiny")
    assert scores.samples == 3
    assert json.loads((tmp_path / "scores.json").read_text())["samples_in_split"] == 7


def test_beam_search_and_batch_do_not_change_a_sample(export_dir: Path, shard_dir: Path, tmp_path: Path) -> None:
    beams = GenerationOptions(num_beams=3, max_new_tokens=6, length_penalty=0.5)
    tables = []
    for size in (1, 7):
        evaluate(export_dir, shard_dir, tmp_path / str(size), micro_batch=size, generation=beams)
        tables.append(read_predictions(tmp_path / str(size) / "predictions.parquet"))
    assert tables[0] == tables[1]


def test_batches_that_stand_for_nothing_leave_nothing(export_dir: Path, shard_dir: Path) -> None:
    model, processor = load_export(export_dir)
    plan = Plan([Source(read_index(shard_dir), "test")], PlanOptions("clip", shuffle=False))
    sizes = processor.options
    fetch = FetchFrames(sizes.max_frames, sizes.frame_stride, sizes.image_pixels)
    loader = EvalLoader(
        plan, fetch, CollatePrompts(processor, model.visual.config.clip_sizes()), rank=8, world_size=9, micro_batch=2
    )
    model.train()
    assert translate(model, processor, loader.padded(), FAST) == []
    assert model.training


def layout(model: LlavaSltForConditionalGeneration, *lengths: int) -> ClipLayout:
    return ClipLayout.of(lengths, model.visual.config.clip_sizes())


def test_greedy_search_is_argmax_of_the_forward_pass(export_dir: Path) -> None:
    model, processor = load_export(export_dir)
    frames = torch.randint(0, 255, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompt = processor([5])
    batch = {"frames_NHWC": frames, "layout": layout(model, 5), **prompt}
    expected: list[int] = []
    ids = prompt["input_ids"]
    while len(expected) < 4 and processor.eos_id not in expected:
        with torch.no_grad():
            logits = model(input_ids=ids, frames=frames, frame_lengths=torch.tensor([5])).logits
        expected.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([expected[-1:]])], 1)
    texts = translate_batch(model, processor, batch, GenerationOptions(max_new_tokens=4))
    assert texts == processor.decode(torch.tensor([expected]))


def test_nothing_comes_from_the_llms_own_generation_config(export_dir: Path, tmp_path: Path) -> None:
    """Chat models ship sampling and repetition penalties; scores must not depend on them."""
    model, processor = load_export(export_dir)
    frames = torch.randint(0, 255, (9, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batch = {"frames_NHWC": frames, "layout": layout(model, 4, 5), **processor([4, 5])}
    plain = translate_batch(model, processor, batch, GenerationOptions(max_new_tokens=8))
    for config in (model.generation_config, model.llm.generation_config):
        config.repetition_penalty, config.no_repeat_ngram_size, config.temperature = 5.0, 1, 0.1
        config.do_sample = True
    assert translate_batch(model, processor, batch, GenerationOptions(max_new_tokens=8)) == plain


def damaged_copy(export_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export_dir, tmp_path / "copy"))


def test_missing_weights_are_refused(export_dir: Path, tmp_path: Path) -> None:
    folder = damaged_copy(export_dir, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.startswith("connector."))
    weights["stray.weight"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 weights missing \(connector\..*1 weights that the model does not have"
    ):
        load_export(folder)


def test_unusable_folders_are_refused(export_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json; give the folder that `slt export` wrote"):
        load_export(tmp_path)
    folder = damaged_copy(export_dir, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the model cannot be loaded .*export the run again"):
        load_export(folder)


def test_devices_are_checked(export_dir: Path) -> None:
    with pytest.raises(RecipeError, match="not a device name such as cpu"):
        load_export(export_dir, "warp")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="no CUDA device is visible"):
            load_export(export_dir, "cuda:0")


def test_precision(export_dir: Path) -> None:
    assert load_export(export_dir)[0].dtype == torch.float32
    assert load_export(export_dir, precision="bf16")[0].dtype == torch.bfloat16


def test_wrong_requests(export_dir: Path, shard_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a scoring protocol"):
        evaluate(tmp_path / "absent", shard_dir, tmp_path, protocol="bleurt")
    with pytest.raises(DataError, match="no sample has split 'dev'"):
        evaluate(export_dir, shard_dir, tmp_path, split="dev")
    with pytest.raises(RecipeError, match="num_beams 0 and max_new_tokens 64 must be at least 1"):
        GenerationOptions(num_beams=0)


def test_an_export_says_what_attends(export_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_export(export_dir)
    for part in ("the encoder", "the language model"):
        assert (
            f"attention of {part}: sdpa (auto); not fa4, fa3, fa2, torch_varlen: needs a CUDA device, not cpu"
            in caplog.text
        )


def test_features_of_another_backbone_are_refused(export_dir: Path, tmp_path: Path) -> None:
    """The same width alone would give scores, of nothing."""
    write_tar(tmp_path / "test-0.tar", [("a.npy", npy(np.zeros((6, 12), "<f2"))), ("a.json", b'{"text": "sun"}')])
    manifest = adopt(tmp_path)
    with pytest.raises(
        RecipeError, match=r"manifest\.json lacks options\.features\.fingerprint: it does not say which"
    ):
        evaluate(export_dir, tmp_path, tmp_path / "out")
    manifest.options = {"features": {"fingerprint": "0" * 32, "width": 12}}
    write_index(tmp_path, pq.read_table(tmp_path / "index.parquet"), manifest)
    with pytest.raises(RecipeError, match=r"of another backbone or preprocessing .*; use the video shards, or extract"):
        evaluate(export_dir, tmp_path, tmp_path / "out")


def test_a_rank_that_died_is_noticed(export_dir: Path, shard_dir: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(generation=FAST)
    with pytest.raises(DataError, match="rank 1 of 2 left no predictions"):
        evaluate_export(export_dir, [shard_dir], tmp_path, options, EvalRanks(0, 2))
