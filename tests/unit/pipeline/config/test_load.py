from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline.config import load as load_module
from pipeline.config.load import BUILTIN_RECIPES, STAND_INS, find_recipe, load, load_recipe
from pipeline.config.names import is_secret, nearest_setting, section_of, setting_names
from pipeline.config.schema import Recipe
from pipeline.errors import RecipeError
from tests.unit.pipeline.config.recipes import CONNECTOR, CONTRASTIVE, PRETRAINING, write


def problems(path: Path, *sets: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, sets)
    return str(caught.value)


def test_a_sound_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, CONNECTOR))
    assert recipe.train.optimizer.lr == 1e-3 and recipe.train.optimizer.betas == (0.9, 0.95)


def test_every_problem_in_one_message(tmp_path: Path) -> None:
    text = CONNECTOR.replace("steps: 10", "steps: 10\n  stepz: 3").replace("global_batch: 8", 'global_batch: "8"')
    text = text.replace("llm:\n    path: models/llm", "llm: {tiny: {width: 100, heads: 3}}")
    text += "connector: {prompt: no placeholder}\n"
    path = write(tmp_path, text)
    message = problems(path, "train.optimizer.lrr=1", "nothing")
    lines = message.splitlines()
    assert lines[0] == f"{path} cannot be used: 7 problems"
    for expected in (
        "--set nothing: must look like a.b=value",
        "--set train.optimizer.lrr=1: train.optimizer.lrr is not a setting; did you mean train.optimizer.lr?",
        f"{path}:13: train.stepz is not a setting; did you mean train.steps?",
        f"{path}:14: train.global_batch must be a valid integer, got '8'",
        f"{path}:5: model.llm.tokenizer is missing",
        f"{path}:5: model.llm.tiny.heads=3 does not divide model.llm.tiny.width=100",
        f"{path}:21: connector.prompt must contain {{video}} exactly once",
    ):
        assert any(expected in line for line in lines), (expected, message)


def test_rules_are_silent_about_settings_that_are_wrong_themselves(tmp_path: Path) -> None:
    path = write(tmp_path, CONNECTOR.replace("micro_batch: 2", "micro_batch: two"))
    assert problems(path).splitlines()[1:] == [f"  {path}:15: train.micro_batch must be a valid integer, got 'two'"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stage: connector", "stage: conector", "stage must be 'continued_pretraining', 'contrastive', 'connector' or"
         " 'sequence_tuning', got 'conector'; did you mean connector?"),
        ("    - shards: shards/video", "    - shard: x", "data.train.0.shards is missing"),
        ("data:\n  train:\n    - shards: shards/video\n", "", "data is missing"),
        ("train:\n    - shards: shards/video", "train: []", "data.train: list should have at least 1 item"),
        ("  llm:\n    path: models/llm", "  llm: models/llm", "model.llm must be a section with its own settings"),
        ("optimizer: {lr: 1e-3}", "optimizer:", "train.optimizer must be a section with its own settings,"),
        ("{lr: 1e-3}", "{lr: 0}", "train.optimizer.lr must be greater than 0, got 0"),
        ("{lr: 1e-3}", "{lr: 1e999}", "train.optimizer.lr must be a finite number"),
        ("{lr: 1e-3}", "{lr: 1, betas: [0.9]}", "train.optimizer.betas.1 is missing"),
        ("steps: 10", "steps: 1e1", "train.steps must be a valid integer, got 10.0"),
        ("steps: 10", "steps: true", "train.steps must be a valid integer, got True"),
        ("name: tiny", "lr: 1\nname: tiny", "lr is not a setting; did you mean train.optimizer.lr?"),
    ],
)  # fmt: skip
def test_wrong_values(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CONNECTOR
    assert message in problems(write(tmp_path, CONNECTOR.replace(old, new)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2", "model.gradient_checkpointing must be a valid boolean or less than 1 or 'auto', got 2"),
        ("0", "model.gradient_checkpointing must be a valid boolean or greater than 0 or 'auto', got 0"),
        ("all", "model.gradient_checkpointing must be a valid boolean or a valid number or 'auto', got 'all'"),
    ],
)
def test_a_setting_of_several_types_is_one_problem(tmp_path: Path, value: str, message: str) -> None:
    path = write(tmp_path, CONNECTOR)
    with pytest.raises(RecipeError) as error:
        load(path, [f"model.gradient_checkpointing={value}", "connector.prompt=none"])
    first, *lines = str(error.value).splitlines()
    assert first.endswith("2 problems") and lines[0].endswith(f": {message}") and "connector.prompt" in lines[1]
    text = problems(path, "data.train.0.weight=much")
    assert "1 problem" in text and "data.train.0.weight must be a valid number or a valid array, got 'much'" in text


def test_extends_is_one_level_deep_merging(tmp_path: Path) -> None:
    write(tmp_path, CONNECTOR, "base.yaml")
    path = write(tmp_path, "extends: base.yaml\nname: child\ntrain:\n  optimizer: {lr: 2e-3}\n  world_sizes: [4]\n")
    loaded = load(path, ["train.global_batch=16", "model.connector={hidden: 7}"])
    assert loaded.recipe.name == "child" and loaded.recipe.stage == "connector"
    assert loaded.recipe.train.world_sizes == [4]
    assert loaded.origin("train.optimizer.lr") == f"{path}:4"
    assert loaded.origin("train.steps") == f"{tmp_path / 'base.yaml'}:13"
    assert loaded.origin("train.global_batch") == "--set train.global_batch=16"
    assert loaded.origin("model.connector.hidden") == "--set model.connector={hidden: 7}"
    assert loaded.origin("train.optimizer.eps") == "default"
    third = write(tmp_path, "extends: recipe.yaml\n", "third.yaml")
    assert f"{third}:1: extends works one level deep, but {path} extends 'base.yaml'" in problems(third)


def test_extends_of_a_built_in_and_bad_ones(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "extends: demo_connector\nname: mine\n")).name == "mine"
    assert "did you mean demo_connector?" in problems(write(tmp_path, "extends: demo_conector\n"))
    assert "extends must name one recipe, got 3" in problems(write(tmp_path, "extends: 3\n"))
    assert "extends names the recipe itself" in problems(write(tmp_path, "extends: recipe.yaml\n"))


def test_an_alternative_in_a_child_needs_null(tmp_path: Path) -> None:
    write(tmp_path, CONTRASTIVE, "base.yaml")
    child = "extends: base.yaml\nmodel: {visual: {backbone: {path: some/vit}}}\n"
    assert "takes exactly one of path and tiny, got both; set one of them to null" in problems(write(tmp_path, child))
    child = child.replace("some/vit", "some/vit, tiny: null")
    assert load_recipe(write(tmp_path, child)).model.visual.backbone.path == "some/vit"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.steps", "must look like a.b=value"),
        ("train..steps=1", "must look like a.b=value"),
        ("train.steps=[1", "the value '[1' is not valid YAML"),
        ("name.x=1", "name.x: name is a value, not a section"),
        ("data.train.3.weight=2", "data.train.3: give a list position 0..0"),
        ("data.train.first.weight=2", "data.train.first: give a list position 0..0"),
    ],
)
def test_bad_sets(tmp_path: Path, text: str, message: str) -> None:
    assert f"--set {text}: {message}" in problems(write(tmp_path, CONNECTOR), text)


def test_sets_reach_lists_absent_sections_and_null(tmp_path: Path) -> None:
    sets = ["data.train.0.weight=2", "model.connector.hidden=3", "train.steps=null", "train.epochs=1.5"]
    recipe = load_recipe(write(tmp_path, CONNECTOR), sets)
    assert (recipe.data.train[0].weight, recipe.model.connector.hidden, recipe.train.epochs) == (2, 3, 1.5)


def test_find_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo_connector") == find_recipe("demo_connector.yaml")
    with pytest.raises(
        RecipeError, match=r"neither a recipe file nor a built-in recipe; did you mean demo_connector\?"
    ):
        find_recipe("demo_conector")
    with pytest.raises(RecipeError, match="is a folder; name a recipe file inside it"):
        find_recipe(tmp_path)
    with pytest.raises(RecipeError, match="neither a recipe file"):
        find_recipe("missing/demo_connector.yaml")


def test_notes_name_settings_the_stage_never_reads(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, CONNECTOR + "contrastive: {embed: 3}\n"))
    assert loaded.notes == (f"contrastive ({loaded.path}:21) is not read by the connector stage",)
    assert load(write(tmp_path, CONNECTOR)).notes == ()
    note = "train.optimizer.warmup_steps=11 is longer than the run (train.steps=10)"
    assert load(write(tmp_path, CONNECTOR), ["train.optimizer.warmup_steps=11"]).notes == (note,)


TUNING = CONNECTOR.replace("stage: connector", "stage: sequence_tuning").replace(
    "model:\n", "model:\n  init_from: {connector: models/stage3}\n"
)

UNREAD_CASES = [
    (PRETRAINING, "data.length_window=8", "is not read by the continued_pretraining stage"),
    (CONTRASTIVE, "train.peak_tflops=100.0", "is not read by the contrastive stage"),
    (CONNECTOR, "data.block_tokens=99", "is not read by the connector stage"),
    (PRETRAINING, "data.augment.flip=0.5", "is not read by the continued_pretraining stage"),
    (PRETRAINING, "data.references.train=[paraphrase]", "is not read by the continued_pretraining stage"),
    (CONTRASTIVE, "data.references.scored=[paraphrase]", "is not read by the contrastive stage"),
    (CONNECTOR, "data.references.scored=[paraphrase]", "is not read: data.eval is empty"),
    (PRETRAINING, "data.jitter.before_seconds=0.5", "is not read by the continued_pretraining stage"),
    (CONTRASTIVE, "data.jitter.probability=0.5", "is not read: data.jitter moves no cut"),
    (CONTRASTIVE, "data.augment.erase_area=[0.1, 0.2]", "is not read: data.augment.erase is 0"),
    (CONTRASTIVE, "data.pack_tokens=99", "is not read by the contrastive stage"),
    (CONNECTOR, "model.visual.centre_clips=false", "is not read: it comes from the exported encoder in model.visual"),
    (CONNECTOR, "model.visual.word.stride=2", "is not read: it comes from the exported encoder in model.visual.path"),
    (CONTRASTIVE, "contrastive.ctc.unusable=leave_out", "is not read: contrastive.ctc.weight and set_weight are 0"),
    (CONTRASTIVE, "contrastive.ctc.order=video", "is not read: contrastive.ctc.weight is 0"),
    (CONTRASTIVE, "model.visual.backbone.lora_rank=4", "is not read: model.visual.backbone.train is full, not lora"),
    (CONTRASTIVE, "train.optimizer.decay_fraction=0.5", "is not read: train.optimizer.schedule is cosine, not wsd"),
    (CONNECTOR, "data.storage_options={profile: x}", "is not read: no source is in an object store"),
    (CONNECTOR, "train.eval_batches=2", "is not read: data.eval is empty"),
    (CONNECTOR, "connector.num_beams=2", "is not read: data.eval is empty"),
    (TUNING, "connector.num_beams=2", "is not read: data.eval is empty"),
    (TUNING, "sequence_tuning.sharpness=1.0", "is not read: sequence_tuning.objective is grpo"),
]


@pytest.mark.parametrize(("text", "setting", "said"), UNREAD_CASES, ids=[case[1] for case in UNREAD_CASES])
def test_notes_name_every_setting_that_nothing_reads(tmp_path: Path, text: str, setting: str, said: str) -> None:
    (note,) = load(write(tmp_path, text), [setting]).notes
    assert setting.split("=")[0].startswith(note.split(" (")[0]) and f"(--set {setting}) {said}" in note


@pytest.mark.parametrize("text", [PRETRAINING, CONTRASTIVE, CONNECTOR])
def test_every_stage_reads_the_attention(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path, text), ["model.attention=sdpa"]).notes == ()


def test_recipes_of_earlier_versions_may_hold_row_chunk(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, CONTRASTIVE), ["contrastive.row_chunk=64"])
    assert loaded.notes == (
        "contrastive.row_chunk does nothing any more: contrastive.tile_mib bounds rows and columns by itself",
    )
    assert loaded.recipe == load(write(tmp_path, CONTRASTIVE)).recipe
    # a resolved recipe of another stage holds it, too, and nobody wrote it there
    assert load(write(tmp_path, PRETRAINING), ["contrastive.row_chunk=0"]).notes == ()


def test_notes_follow_the_objective_and_the_schedule(tmp_path: Path) -> None:
    sets = ["contrastive.token_weight=2.0", "model.text_encoder.token_features=embeddings"]
    path = write(tmp_path, CONTRASTIVE)
    assert load(path, sets).notes == ()
    assert len(load(path, [*sets, "contrastive.objective=sentence"]).notes) == 2
    for setting in ("model.text_encoder.pooling=last", "contrastive.sentence_loss=sigmoid"):
        (note,) = load(path, [setting, "contrastive.objective=token"]).notes
        assert note.endswith("is not read: contrastive.objective is token")
    (note,) = load(path, ["train.optimizer.final_lr_fraction=0.5", "train.optimizer.schedule=constant"]).notes
    assert note.endswith("is not read: train.optimizer.schedule is constant")


def test_notes_follow_the_objective_of_sequence_tuning(tmp_path: Path) -> None:
    """What samples are made and scored by is read without held-out data."""
    path = write(tmp_path, TUNING)
    assert load(path, ["connector.max_new_tokens=9", "connector.score_protocol=phoenix14t"]).notes == ()
    (note,) = load(path, ["sequence_tuning.clip=0.1", "sequence_tuning.objective=minimum_risk"]).notes
    assert note.endswith("is not read: sequence_tuning.objective is minimum_risk")


def test_a_written_default_is_no_reason_for_a_note(tmp_path: Path) -> None:
    """As in a resolved recipe, which writes every value."""
    assert load(write(tmp_path, CONNECTOR + "contrastive: {embed: 128}\n"), ["model.attention=auto"]).notes == ()


@pytest.mark.parametrize("path", sorted(BUILTIN_RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_built_in_recipes_set_nothing_that_is_not_read(path: Path) -> None:
    assert load(path).notes == ()


def test_damaged_yaml_is_reported_alone(tmp_path: Path) -> None:
    assert "1 problem\n" in problems(write(tmp_path, "a: [\n"))
    assert "cannot be used: 1 problem" in problems(write(tmp_path, ""))


def test_every_required_setting_has_a_stand_in() -> None:
    def required(model: type[BaseModel], prefix: str) -> set[str]:
        found = set()
        for name, info in model.model_fields.items():
            inner, is_list = section_of(info.annotation)
            found |= {f"{prefix}{name}"} if info.is_required() else set()
            found |= required(inner, f"{prefix}{name}.{'N.' if is_list else ''}") if inner is not None else set()
        return found

    assert required(Recipe, "") == set(STAND_INS)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "hf_token", "HFTOKEN", "MY_TOKEN_2", "WANDB_API_KEY", "OPENAI_APIKEY", "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID", "PGPASSWORD", "DB_PASS", "GOOGLE_APPLICATION_CREDENTIALS", "CLIENT_SECRETS", "KEY1", "key",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "TOKENIZERS_PARALLELISM", "TOKENIZER", "SLT_MAX_TOKENS", "MAX_TOKEN_LENGTH", "KEY_FRAMES", "KEYBOARD", "MONKEY",
        "PATH", "BYPASS", "COMPASS_DIR", "SECRETARY", "endpoint_url",
    ],
)  # fmt: skip
def test_names_that_only_look_like_secrets(name: str) -> None:
    assert not is_secret(name)


def test_nearest_setting() -> None:
    assert nearest_setting("data.train.0.shard") == "data.train.0.shards"
    assert nearest_setting("trian") == "train"
    assert nearest_setting("model.lr") == "train.optimizer.lr"
    assert nearest_setting("qqqq.zzzz") is None
    assert "data.train.N.shards" in setting_names()


def test_built_in_recipes_lie_in_the_project() -> None:
    assert load_module.BUILTIN_RECIPES.is_dir()
