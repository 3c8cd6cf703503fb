from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from pipeline.config.cli import app
from pipeline.config.fit import fingerprint_of_files
from pipeline.config.inputs import check_inputs, few_texts
from pipeline.config.load import load
from pipeline.errors import RecipeError
from shards.format.index import write_index
from tests.unit.pipeline.config.recipes import CONNECTOR, CONTRASTIVE, PRETRAINING, write
from tests.unit.shards.shard_sets import in_memory

HASHES = [1, 2, 3, 4, 5, 5, 5, 8, 9]
SPLITS = ["train"] * 7 + ["dev"] * 2


def make_set(folder: Path, kind: str = "video", **options: object) -> None:
    """Nine samples: seven to train on, with five distinct texts, three of them in corpus `a`."""
    corpora = ["a"] * 3 + ["b"] * 6
    made = in_memory(kind, [5] * len(HASHES), split=SPLITS, corpus=corpora, text_hash=HASHES)  # type: ignore[arg-type]
    made.manifest.options = options
    made.manifest.shards = [{"name": "train-000000.tar", "samples": 9, "size": 0, "sha256": ""}]
    folder.mkdir(parents=True)
    (folder / "train-000000.tar").touch()
    write_index(folder, made.table, made.manifest)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all that the three small recipes read."""
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "shards" / "video")
    for name, config in CONFIGS.items():
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").touch()
        make_tokenizer(folder, 4)
    make_set(tmp_path / "shards" / "text", "text", tokenizer=fingerprint_of_files(tmp_path / "models" / "tokenizer"))
    return tmp_path


CONFIGS = {
    "llm": {"model_type": "llama", "vocab_size": 4, "num_attention_heads": 4},
    "visual": {"model_type": "slt_visual", "image_pixels": 64, "max_frames": 512},
    "text": {"model_type": "bert", "vocab_size": 5},
    "tokenizer": {},
}


def make_tokenizer(folder: Path, ids: int) -> None:
    """As many words, the last of them ends a text."""
    vocabulary = {**{f"w{number}": number for number in range(ids - 1)}, "</s>": ids - 1}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def refused(text: str, *sets: str) -> list[str]:
    """Lines of the refusal, without the first."""
    with pytest.raises(RecipeError) as caught:
        check_inputs(load(write(Path.cwd(), text), sets))
    first, *lines = str(caught.value).splitlines()
    assert first == f"recipe.yaml cannot be used: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return [line.strip() for line in lines]


@pytest.mark.parametrize("text", [CONNECTOR, CONTRASTIVE, PRETRAINING])
def test_recipes_whose_inputs_are_there(text: str, world: Path) -> None:
    sets = ["data.eval=[{shards: X, split: dev}]".replace("X", f"shards/{'text' if text is PRETRAINING else 'video'}")]
    check_inputs(load(write(world, text), sets))
    check_inputs(load(write(world, text.replace("shards/", f"file://{world}/shards/"))))


def test_everything_that_is_missing_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["model.llm.path=runs/demo/stage1/export", "data.eval=[{shards: other}]"]
    assert refused(CONNECTOR, *sets) == [
        "recipe.yaml:11: data.train.0.shards=shards/video does not exist; build it with `slt shards build`, or correct"
        " the path",
        "--set data.eval=[{shards: other}]: data.eval.0.shards=other does not exist; build it with `slt shards build`,"
        " or correct the path",
        "--set model.llm.path=runs/demo/stage1/export: model.llm.path=runs/demo/stage1/export does not exist; it is"
        " written by `slt export runs/demo/stage1` once that stage has been trained",
        "recipe.yaml:8: model.visual.path=models/visual does not exist; name an existing folder",
    ]


def test_shard_sets_that_cannot_be_used(world: Path) -> None:
    video = world / "shards" / "video"
    (video / "train-000000.tar").unlink()
    assert refused(CONNECTOR) == [
        "recipe.yaml:11: data.train.0.shards=shards/video: 1 of its 1 shards are missing, first train-000000.tar; copy"
        " the set again"
    ]
    (video / "index.parquet").unlink()
    assert "shards/video has no index.parquet: not a shard set, or its build did not finish" in refused(CONNECTOR)[0]
    (video / "index.parquet").touch()
    for damage in ("{", "[]", '{"kind": "video"}', '{"kind": "video", "splits": [], "shards": []}'):
        (video / "manifest.json").write_text(damage)
        assert "data.train.0.shards=shards/video: its manifest.json cannot be read (" in refused(CONNECTOR)[0]


def test_shard_sets_that_are_cut_short(world: Path) -> None:
    video = world / "shards" / "video"
    (video / "train-000000.tar").write_bytes(b"12345")
    assert refused(CONNECTOR) == [
        "recipe.yaml:11: data.train.0.shards=shards/video: train-000000.tar has 5 bytes, its manifest says 0; copy the"
        " set again"
    ]
    (video / "train-000000.tar").write_bytes(b"")
    manifest = json.loads((video / "manifest.json").read_text())
    (video / "manifest.json").write_text(json.dumps(manifest | {"splits": {"train": 8, "dev": 2}}))
    assert refused(CONNECTOR) == [
        "recipe.yaml:11: data.train.0.shards=shards/video: its index.parquet has 9 rows, its manifest says 10 samples;"
        " copy the set again, or write it again with `slt shards index`"
    ]


def test_folders_that_may_not_be_read(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(folder))

    loaded = load(write(world, CONNECTOR))
    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(RecipeError) as caught:
        check_inputs(loaded)
    fix = "Permission denied; correct its permissions or its mount"
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        f"recipe.yaml:11: data.train.0.shards=shards/video cannot be read: shards/video: {fix}",
        f"recipe.yaml:6: model.llm.path=models/llm cannot be read: models/llm: {fix}",
        f"recipe.yaml:8: model.visual.path=models/visual cannot be read: models/visual: {fix}",
    ]


def test_an_epoch_smaller_than_a_global_batch(world: Path) -> None:
    epochs = ["train.steps=null", "train.epochs=2", "train.micro_batch=1"]
    check_inputs(load(write(world, CONNECTOR), [*epochs, "train.global_batch=14"]))
    text = "train.epochs=2 of at most {} items is less than one global batch of {}; lower train.global_batch or raise"
    assert text.format(7, 20) in refused(CONNECTOR, *epochs, "train.global_batch=20")[0]
    some = ["data.train.0.corpus=a", "data.train.0.weight=[[0, 1.0], [3, 2.0]]"]
    assert text.format(6, 16) in refused(CONNECTOR, *epochs, *some, "train.global_batch=16")[0]
    assert text.format(9, 24) in refused(CONNECTOR, *epochs, "data.epoch_samples=9", "train.global_batch=24")[0]
    assert text.format(7, 20) in refused(PRETRAINING, *epochs, "train.global_batch=20")[0]
    many = [*epochs, "train.global_batch=16"]  # 7 documents of 5 tokens in blocks of 4 are 15 pieces
    check_inputs(load(write(world, PRETRAINING), [*many, "data.block_tokens=4"]))
    check_inputs(load(write(world, PRETRAINING), [*epochs, "data.epoch_samples=1", "train.global_batch=64"]))


def test_a_remark_on_few_texts(world: Path) -> None:
    recipe = load(write(world, CONTRASTIVE), ["train.global_batch=6", "train.micro_batch=1"]).recipe
    assert few_texts(recipe) == (
        "train.global_batch=6 is more than the 5 distinct texts of data.train: equal texts are no negatives, so a"
        " larger batch adds none"
    )
    assert not few_texts(load(write(world, CONTRASTIVE), ["train.global_batch=4"]).recipe)
    assert not few_texts(load(write(world, CONNECTOR)).recipe)


def test_a_kind_of_shards_that_the_stage_does_not_read(world: Path) -> None:
    assert (
        "shards/text holds text, but this stage reads video or features"
        in refused(CONNECTOR, "data.train.0.shards=shards/text")[0]
    )
    assert (
        "shards/video holds video, but this stage reads text"
        in refused(PRETRAINING, "data.train.0.shards=shards/video")[0]
    )


def test_splits_and_corpora(world: Path) -> None:
    assert refused(CONNECTOR, "data.eval=[{shards: shards/video, split: test}]") == [
        "--set data.eval=[{shards: shards/video, split: test}]: data.eval.0.split=test: shards/video has"
        " dev (2), train (7)"
    ]
    assert refused(CONNECTOR, "data.train.0.split=dve")[0].endswith("dev (2), train (7); did you mean dev?")
    assert refused(CONNECTOR, "data.train.0.corpus=c") == [
        "--set data.train.0.corpus=c: data.train.0.corpus=c: split train of shards/video has a, b"
    ]
    check_inputs(load(write(world, CONNECTOR), ["data.train.0.corpus=a"]))
    (world / "shards" / "video" / "index.parquet").write_bytes(b"PAR1")
    assert (
        "data.train.0.shards=shards/video: its index.parquet cannot be read ("
        in refused(CONNECTOR, "data.train.0.corpus=a")[0]
    )


def test_keypoints_beside_a_source(world: Path) -> None:
    (found,) = refused(CONNECTOR, "data.train.0.pose=shards/pose")
    assert found.endswith(
        "data.train.0.pose=shards/pose does not exist; build it with `slt shards build`, or correct the path"
    )
    (found,) = refused(CONNECTOR, "data.train.0.pose=shards/video")
    assert "data.train.0.pose=shards/video holds video, but this stage reads features" in found


def test_distinct_texts_against_the_global_batch(world: Path) -> None:
    sets = ["data.unique_texts=true", "train.micro_batch=1"]
    check_inputs(load(write(world, CONTRASTIVE), [*sets, "train.global_batch=5"]))
    check_inputs(load(write(world, CONTRASTIVE), ["train.global_batch=256"]))
    assert refused(CONTRASTIVE, *sets, "train.global_batch=6") == [
        "--set train.global_batch=6: train.global_batch=6 is more than the 5 distinct texts of data.train, but"
        " data.unique_texts allows none twice in a batch; lower the batch, add data, or set data.unique_texts=false"
    ]
    one = [*sets, "data.train.0.corpus=a", "train.global_batch=4"]
    assert "more than the 3 distinct texts" in refused(CONTRASTIVE, *one)[0]
    make_set(world / "again")
    both = [*sets, "data.train=[{shards: shards/video}, {shards: again}]", "train.global_batch=6"]
    assert "more than the 5 distinct texts" in refused(CONTRASTIVE, *both)[0], "equal texts of two sets are one"
    (world / "shards" / "video" / "index.parquet").write_bytes(b"PAR1")
    assert "its index.parquet cannot be read (" in refused(CONTRASTIVE, *sets)[0]
    remote = [*sets, "data.train.0.shards='s3://b/set'", "data.cache_dir=cache", "train.global_batch=256"]
    check_inputs(load(write(world, CONTRASTIVE), remote))
    labelled = [*sets, "data.train=[{shards: shards/video, text: label}]", "train.global_batch=6"]
    (world / "shards" / "video" / "index.parquet").unlink()
    make_set(world / "set")
    check_inputs(load(write(world, CONTRASTIVE), [text.replace("shards/video", "set") for text in labelled]))


def test_pretrained_parts(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = world / "models" / "llm"
    (llm / "model.safetensors").unlink()
    assert refused(CONNECTOR) == [
        "recipe.yaml:6: model.llm.path=models/llm holds no weights (*.safetensors or *.bin); copy or export it again"
    ]
    (llm / "tokenizer.json").unlink()
    (llm / "tokenizer_config.json").unlink()
    assert refused(CONNECTOR)[1].endswith(
        "models/llm holds no tokenizer (tokenizer.json or tokenizer_config.json or tokenizer.model)"
    )
    check_inputs(load(write(world, CONTRASTIVE), ["model.llm.path=models/llm"]))  # not read by that stage
    (llm / "config.json").unlink()
    assert "models/llm holds no config.json, so it is not a Hugging Face model" in refused(CONNECTOR)[0]
    assert refused(PRETRAINING, "model.llm.tokenizer=./tok")[0].endswith(
        "model.llm.tokenizer=./tok does not exist; name an existing folder or a hub id"
    )


def test_hub_ids_are_the_hub_s_business_unless_it_cannot_be_asked(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(world / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    sets = ["model.llm.path=Qwen/Qwen2.5-1.5B"]
    check_inputs(load(write(world, CONNECTOR), sets))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (
        "is not a folder here, and the hub cannot be reached (HF_HUB_OFFLINE); download it"
        in refused(CONNECTOR, *sets)[0]
    )
    (world / "hub" / "models--Qwen--Qwen2.5-1.5B" / "snapshots").mkdir(parents=True)
    check_inputs(load(write(world, CONNECTOR), sets))


def test_recipe_check_looks_at_inputs(world: Path) -> None:
    path = write(world, CONNECTOR)
    assert CliRunner().invoke(app, ["check", str(path)]).exit_code == 0
    missing = ["check", str(path), "--json", "--set", "data.train.0.split=test"]
    result = CliRunner().invoke(app, missing)
    assert isinstance(result.exception, RecipeError) and "data.train.0.split=test" in str(result.exception)
    assert json.loads(CliRunner().invoke(app, [*missing, "--settings-only"]).stdout)["ok"]
