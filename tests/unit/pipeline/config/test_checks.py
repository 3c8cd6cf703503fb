"""Every rule between settings: the smallest recipe that breaks it, and what the user reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_recipe
from pipeline.errors import RecipeError
from tests.unit.pipeline.config.recipes import CONNECTOR, CONTRASTIVE, PRETRAINING, write

CASES = [
    (CONNECTOR, ["train.epochs=1"], "train.steps=10 and train.epochs=1.0 are both given; set one of them to null"),
    (CONNECTOR, ["train.steps=null"], "the length of the run is missing: give train.steps or train.epochs"),
    (CONNECTOR, ["model.llm=null"], "stage connector needs model.llm"),
    (CONNECTOR, ["model.visual=null"], "stage connector needs model.visual"),
    (CONTRASTIVE, ["model.text_encoder=null"], "stage contrastive needs model.text_encoder"),
    (CONTRASTIVE, ["model.visual=null"], "stage contrastive needs model.visual"),
    (PRETRAINING, ["model.llm=null"], "stage continued_pretraining needs model.llm"),
    (PRETRAINING, ["model.llm.path=x"], "model.llm takes exactly one of path and tiny, got both"),
    (CONNECTOR, ["model.llm.path=null"], "model.llm needs exactly one of path and tiny, got neither"),
    (CONTRASTIVE, ["model.visual.path=x"], "model.visual takes exactly one of path and backbone, got both"),
    (CONNECTOR, ["model.visual.path=null"], "model.visual needs exactly one of path and backbone, got neither"),
    (CONTRASTIVE, ["model.visual.features={fingerprint: f, width: 4}"],
     "model.visual takes exactly one of backbone and features: stored features stand where a backbone would"),
    (CONTRASTIVE, ["model.visual.backbone=null", "model.visual.path=x", "model.visual.pose={layout: openpose}"],
     "model.visual takes exactly one of path and pose, got both; an export brings what it reads"),
    (CONTRASTIVE, ["model.visual.pose={layout: openpose}"],
     "data.train.0.pose is missing: the encoder reads keypoints beside frames; name their shard set"),
    (CONTRASTIVE, ["data.train.0.pose=x"],
     "data.train.0.pose=x is for encoders with model.visual.pose beside a backbone or features; name"),
    (PRETRAINING, ["data.train.0.pose=x"], "data.train.0.pose=x is for encoders with model.visual.pose"),
    (CONTRASTIVE, ["model.visual.pose={layout: openpose}", "data.train.0.pose=x", "data.augment.flip=0.5"],
     "data.augment.flip=0.5 mirrors frames, but not the keypoints beside them; set 0"),
    (CONNECTOR, ["data.train.0.pose=x", "data.jitter={before_seconds: 0.5}"],
     "data.jitter moves cuts into margins, which the keypoints of data.train.N.pose do not have; leave it out"),
    (CONTRASTIVE, ["model.visual.backbone.kind=video"],
     "model.visual.backbone.kind=video needs a path: tiny makes an image model"),
    (CONTRASTIVE, ["model.visual.backbone={path: x, kind: video}"],
     "model.visual.backbone.pool=cls, but kind=video has only a mean; set pool: mean"),
    (CONTRASTIVE, ["model.visual.backbone={}"], "model.visual.backbone needs exactly one of path and tiny"),
    (PRETRAINING, ["model.llm.tokenizer=null"], "model.llm.tokenizer is missing: random (tiny) weights"),
    (PRETRAINING, ["model.llm.tiny.heads=3"], "model.llm.tiny.heads=3 does not divide model.llm.tiny.width=64"),
    (PRETRAINING, ["model.llm.tiny.heads=64"], "width / heads = 1 must be even"),
    (CONTRASTIVE, ["model.visual.word.heads=5"], "model.visual.word.heads=5 does not divide model.visual.width=128"),
    (CONTRASTIVE, ["model.visual.sentence.heads=5"], "model.visual.sentence.heads=5 does not divide"),
    (CONTRASTIVE, ["model.visual.backbone.tiny.heads=5"], "backbone.tiny.heads=5 does not divide"),
    (CONTRASTIVE, ["contrastive.ctc={weight: 1, order: video}"], "contrastive.ctc.order=video needs"
     " contrastive.ctc.set_weight above 0: what tells the order is a classifier"),
    (CONTRASTIVE, ["data.image_pixels=60"], "data.image_pixels=60 is not a multiple of"),
    (CONTRASTIVE, ["data.max_frames=600"], "data.max_frames=600 is more than the positions of"),
    (CONNECTOR, ["train.world_sizes=[]"], "train.world_sizes is empty; list at least one"),
    (CONNECTOR, ["train.world_sizes=[1, 1]"], "train.world_sizes=[1, 1] names a world size twice"),
    (CONNECTOR, ["train.world_sizes=[0]"], "a world size must be at least 1, got 0"),
    (CONNECTOR, ["train.world_sizes=[3]"], "train.global_batch=8 is not a multiple of train.micro_batch=2 x 3 ranks"
     " = 6; 6 or 12 would be"),
    (CONNECTOR, ["train.world_sizes=[16]"], "= 32; 32 would be"),
    (CONTRASTIVE, ["train.global_batch=1", "train.micro_batch=1"], "leaves a contrastive loss without negatives"),
    (CONNECTOR, ["train.sequence_parallel=2", "train.world_sizes=[2]"], "train.sequence_parallel=2 belongs to the"
     " continued_pretraining stage, not to connector; set it to 1"),
    (CONTRASTIVE, ["train.sequence_parallel=2", "train.world_sizes=[2]"], "stage, not to contrastive; set it to 1"),
    (PRETRAINING, ["train.sequence_parallel=2", "train.world_sizes=[3]"], "world size 3 is not a multiple of"
     " train.sequence_parallel=2; change one of them"),
    (PRETRAINING, ["train.sequence_parallel=2", "train.world_sizes=[16]"], "train.micro_batch=2 x 8 groups of ranks"),
    (PRETRAINING, ["train.sequence_parallel=3", "train.world_sizes=[3]", "data.block_tokens=256"],
     "data.block_tokens=256 is not a multiple of train.sequence_parallel=3: slices must be equal"),
    (PRETRAINING, ["train.sequence_parallel=3", "train.world_sizes=[3]", "data.block_tokens=255"],
     "model.llm.tiny: 4 attention heads and 4 key heads cannot be shared by train.sequence_parallel=3 ranks"),
    (PRETRAINING, ["continued_pretraining.offload_activations=true"], "offload_activations moves what"
     " model.gradient_checkpointing keeps; set both"),
    (PRETRAINING, ["model.init_from.visual=x"], "model.init_from.visual: the model of the continued_pretraining stage"
     " has only llm; remove it"),
    (CONNECTOR, ["model.init_from.heads=x"], "stage has only visual, llm, connector; remove it"),
    (CONTRASTIVE, ["model.init_from.llm=x"], "stage has only visual, heads; remove it"),
    (CONNECTOR, ["model.init_from.model=~/x"], "model.init_from.model='~/x': recipes do not expand variables or ~"),
    (CONNECTOR, ["train.early_stop={patience: 3}"], "train.early_stop needs evaluations during training: set"
     " train.eval_every_steps and data.eval"),
    (CONNECTOR, ["train.early_stop={patience: 3, metric: eval/rouge_l}", "train.eval_every_steps=5",
     "data.eval=[{shards: x}]"], "train.early_stop: give metric and direction"
     " (min or max) together, or neither for the stage's own"),
    (CONNECTOR, ["data.unique_texts=true"], "data.unique_texts belongs to the contrastive stage, not to connector"),
    (CONTRASTIVE, ["data.frame_budget=999"], "in-batch negatives need a fixed batch; set it to null"),
    (PRETRAINING, ["data.frame_budget=999"], "data.frame_budget has no meaning for text"),
    (CONNECTOR, ["data.pack_tokens=99", "data.frame_budget=999"], "two ways to make items; set frame_budget to its"),
    (CONNECTOR, ["data.pack_tokens=99", "data.length_window=9"], "two ways to make items; set length_window to its"),
    (CONNECTOR, ["data.frame_budget=9"], "data.frame_budget=9 cannot hold one clip of data.max_frames=256"),
    (CONNECTOR, ["data.augment.speed=[1.2, 0.8]"], "data.augment.speed must be [lowest, highest] between 0.25 and 4,"
     " got [1.2, 0.8]"),
    (CONTRASTIVE, ["data.augment.crop_area=[0.5, 1.5]"], "data.augment.crop_area must be [lowest, highest] between 0.05"
     " and 1"),
    (CONTRASTIVE, ["data.augment.drop_frames=0.1", "contrastive.ctc.weight=1"], "data.augment makes clips shorter"
     " (speed, drop_frames or keep_part), so that their glosses may not fit any more; set contrastive.ctc.unusable"),
    (PRETRAINING, ["data.block_tokens=600"], "data.block_tokens=600 exceeds model.llm.tiny.max_positions=512"),
    (CONNECTOR, ["train.eval_every_steps=5"], "train.eval_every_steps=5 but data.eval is empty"),
    (CONNECTOR, ["data.train=[{shards: a}, {shards: a, weight: 2}]"], "data.train.1 is the same source as data.train.0"
     " (a); raise its weight instead"),
    (CONNECTOR, ["data.eval=[{shards: a}, {shards: a}]"], "data.eval.1 is the same source as data.eval.0"),
    (CONNECTOR, ["data.train.0.weight=0"], "data.train.0.weight must be positive, it is 0"),
    (CONNECTOR, ["data.train.0.weight=[[3, 1.0], [1, 2.0]]"], "data.train.0.weight needs [epoch, weight] points"),
    (CONNECTOR, ["data.train.0.weight=[]"], "data.train.0.weight needs [epoch, weight] points in ascending order"),
    (CONNECTOR, ["data.train.0.weight=[[0, 0], [1, 0]]"], "data.train.0.weight needs weights of at least 0 and one"),
    (CONNECTOR, ["data.train.0.shards='s3://b/set'"], "data.cache_dir is missing: s3://b/set is in an object store"),
    (CONNECTOR, ["data.access=cache"], "data.access=cache needs data.cache_gib"),
    (CONNECTOR, ["data.cache_gib=5"], "data.cache_gib needs data.cache_dir"),
    (CONNECTOR, ["data.storage_options={secret: x}"], "data.storage_options.secret would be written into every run"),
    (CONNECTOR, ["data.storage_options={kw: {account_key: x}}"], "data.storage_options.kw.account_key would"),
    (PRETRAINING, ["model.attention=fa2"], "model.attention=fa2 computes in 16 bits only, but train.precision=fp32"),
    (CONNECTOR, ["train.optimizer.betas=[0.9, 1.0]"], "train.optimizer.betas.1=1.0 must be at least 0 and below 1"),
    (CONNECTOR, ["connector.prompt='{video}{video}'"], "connector.prompt must contain {video} exactly once"),
    (CONNECTOR, ["stage=sequence_tuning"], "model.init_from.connector is missing: a new connector writes nothing"),
    (CONNECTOR, ["stage=sequence_tuning", "model.init_from.model=models/stage3", "sequence_tuning.bleu_weight=0",
                 "sequence_tuning.rouge_l_weight=0"],
     "sequence_tuning.bleu_weight and sequence_tuning.rouge_l_weight are both 0: every translation has the reward 0"),
    (CONNECTOR, ["connector.prompt='{video} {langage}'"], "{langage} is no field; did you mean {language}?"),
    (CONNECTOR, ["connector.prompt='{video} {gloss}'"], "connector.prompts.gloss.held_out=empty needs a text"),
    (CONNECTOR, ["connector.prompt='{video} {previous}'", "connector.prompts.previous.dropout=0.5"],
     "connector.prompts.previous.dropout=0.5 needs a text that stands there instead"),
    (CONNECTOR, ["connector.prompt='{video} {example}'", "connector.prompts.example.template='{gloss}'"],
     "connector.prompts.example.template='{gloss}' must contain {text}, and no field but {gloss} besides"),
    (CONNECTOR, ["connector.prompts.system=hi"], "connector.prompts.system is a turn of a chat; set chat to true"),
    (CONTRASTIVE, ["model.text_encoder.kind=llm", "model.text_encoder.pooling=cls"], "which has seen no text in a"),
    (CONNECTOR, ["run_dir=$HOME/x"], "run_dir='$HOME/x': recipes do not expand variables"),
    (CONNECTOR, ["model.llm.path=~/llm"], "model.llm.path='~/llm': recipes do not expand variables"),
    (CONNECTOR, ['run_dir="a\\0b"'], "run_dir='a\\x00b' holds a NUL byte, which no path can"),
    (CONNECTOR, ["data.train.0.shards=''"], "data.train.0.shards is empty"),
    (CONNECTOR, ["deepspeed.base=zero33"], "deepspeed.base='zero33' names no file; did you mean zero3?"),
    (CONNECTOR, ["deepspeed.overrides.gradient_clipping=2.0"], "gradient_clipping is decided by the recipe; set"
     " train.optimizer.clip_norm instead"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sets", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_rule(tmp_path: Path, text: str, sets: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), sets)
    assert message in str(caught.value)
    assert "1 problem\n" in str(caught.value), "a rule that breaks must not trip others"


def test_the_place_is_the_line_or_the_set(tmp_path: Path) -> None:
    path = write(tmp_path, CONNECTOR.replace("world_sizes: [1, 2]", "world_sizes: [3]"))
    with pytest.raises(RecipeError, match=rf"{path.name}:14: train.global_batch=8 is not a multiple"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"--set train\.global_batch=9: train.global_batch=9 is not"):
        load_recipe(path, ["train.global_batch=9"])


@pytest.mark.parametrize("text", [CONNECTOR, CONTRASTIVE, PRETRAINING])
def test_the_sound_recipes_are_sound(tmp_path: Path, text: str) -> None:
    recipe = load_recipe(write(tmp_path, text))
    assert f"stage: {recipe.stage}" in text
