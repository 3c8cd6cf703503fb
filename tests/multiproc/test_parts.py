"""`train.parts` on real DeepSpeed processes: any number of ranks, resume here and elsewhere, exports of adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.engine.checkpoint import TAG, list_checkpoints
from pipeline.engine.zero_shards import ZeroShards
from pipeline.evaluate.metrics import score
from pipeline.export.hf import export
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from tests.jobs import World, rows, run_job

pytestmark = pytest.mark.multiproc

TO_ROUNDING = 3e-4
SETTINGS: dict[str, object] = {
    "train__steps": 4, "train__checkpoint__every_steps": 2, "train__checkpoint__keep": 5, "train__optimizer__lr": 0.01,
}  # fmt: skip
STAGE_0, STAGE_2 = ("{zero_optimization: {stage: %d}}" % stage for stage in (0, 2))  # noqa: UP031
ADAPTED = (
    "{llm: {mode: lora, lora_rank: 2, lr: 0.02, start_step: 1}, visual.word: {lr: 0.001, lr_decay: 0.5},"
    " visual.backbone: {mode: lora, lora_rank: 2, lora_targets: ['*_proj', query]}}"
)
UNFROZEN = "{llm: {lr: 0.002, lr_decay: 0.5}, llm.model.layers.0: {mode: frozen}}"
LORA_ALONE = "{connector: {lr: 0.02}, llm: {mode: lora}}"


def run(world: World, name: str, stage: str, ranks: int, **values: object) -> Path:
    """A finished run; made once."""
    run_dir = world.root / "runs" / name
    if not (run_dir / "checkpoints" / "step-000004").exists():
        run_job(stage, world.sets(stage, run_dir, ranks, **SETTINGS, **values), ranks)
    return run_dir


@pytest.fixture(scope="module")
def adapted(world: World) -> Path:
    return run(world, "parts-adapted", "connector", 2, train__parts=ADAPTED)


def test_a_run_of_many_parts_does_not_depend_on_ranks_or_sharding(world: World, adapted: Path) -> None:
    losses = rows(adapted)
    assert losses[4] < losses[1]
    alone = run(world, "parts-alone", "connector", 1, train__parts=ADAPTED, deepspeed__overrides=STAGE_2)
    assert rows(alone) == pytest.approx(losses, rel=TO_ROUNDING)
    assert rows(adapted, "train/lr/llm")[1] == 0 and rows(adapted, "train/lr/llm")[2] > 0
    assert rows(adapted, "train/lr/visual.word")[1] == pytest.approx(0.1 * rows(adapted, "train/lr")[1])


def test_a_checkpoint_holds_what_trains(adapted: Path) -> None:
    shards = ZeroShards.open(list_checkpoints(adapted)[-1].path / TAG)
    words = {name.split(".")[1].partition("_")[0] for name in shards.parameters if name.startswith("visual.")}
    assert words == {"backbone", "word"}
    others = [name for name in shards.parameters if not name.startswith(("connector.", "visual.word"))]
    assert others and all(".lora_" in name for name in others)
    for name in others:
        assert ("lora_B" in name) <= bool(shards.tensor(name).abs().sum() > 0), f"{name} has learned"


@pytest.mark.parametrize(("ranks", "overrides"), [(2, None), (1, STAGE_0), (1, STAGE_2)])
def test_a_run_of_many_parts_goes_on(
    world: World, adapted: Path, tmp_path: Path, ranks: int, overrides: str | None
) -> None:
    """Elsewhere too: every rank count and ZeRO stage finds the parameters of all groups."""
    run_dir = tmp_path / "run"
    shutil.copytree(adapted, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    (run_dir / "checkpoints" / "best").unlink(missing_ok=True)
    values = {} if overrides is None else {"deepspeed__overrides": overrides}
    output = run_job(
        "connector", world.sets("connector", run_dir, ranks, **SETTINGS, train__parts=ADAPTED, **values), ranks
    )
    assert "at step 2" in output
    expected = rows(adapted)
    assert rows(run_dir) == (expected if ranks == 2 else pytest.approx(expected, rel=TO_ROUNDING))
    if overrides == STAGE_0:  # and its own checkpoint says which of its parameters is which
        left, right = (ZeroShards.open(list_checkpoints(at)[-1].path / TAG) for at in (run_dir, adapted))
        for name in right.parameters:
            assert torch.allclose(left.tensor(name), right.tensor(name), rtol=1e-3, atol=1e-5), name
            assert torch.allclose(left.tensor(name, "exp_avg"), right.tensor(name, "exp_avg"), rtol=0.01, atol=1e-5)


def test_exports_of_adapters_equal_the_live_model(world: World, adapted: Path, tmp_path: Path) -> None:
    merged, kept = tmp_path / "merged", tmp_path / "kept"
    assert max(export(adapted, merged).values()) < 1e-4
    assert max(export(adapted, kept, lora="keep").values()) < 1e-4
    names = load_file(merged / "model.safetensors").keys()
    assert names and not any("lora_" in name or "base_layer" in name for name in names)
    assert "adapters" not in json.loads((merged / "config.json").read_text())
    probe = load_file(list_checkpoints(adapted)[-1].path / "probe.safetensors")
    inputs = {name: probe[name] for name in ("input_ids", "attention_mask", "frames", "frame_lengths")}
    outputs = [LlavaSltForConditionalGeneration.from_pretrained(at).eval()(**inputs).logits for at in (merged, kept)]
    assert torch.allclose(*outputs, atol=1e-5)
    config = json.loads((kept / "llm_adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world.root / "reference" / "llm") and config["r"] == 2
    source = load_file(world.root / "reference" / "llm" / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    tensors = load_file(kept / "model.safetensors")
    assert torch.equal(tensors[f"llm.{layer}.base_layer.weight"], source[f"{layer}.weight"])
    assert score(["a"], ["a"], "default").bleu4 >= 0  # the scores that evaluations during the run logged exist
    assert "eval/bleu4" in (adapted / "metrics.jsonl").read_text()


@pytest.mark.parametrize(("name", "parts"), [("unfrozen", UNFROZEN), ("lora", LORA_ALONE)])
def test_a_language_model_trains_in_the_connector_stage(world: World, tmp_path: Path, name: str, parts: str) -> None:
    values = {"train__parts": parts, "model__gradient_checkpointing": "true"}
    two = run(world, f"parts-{name}-2", "connector", 2, **values)
    one = run(world, f"parts-{name}-1", "connector", 1, **values, deepspeed__overrides=STAGE_0)
    assert rows(one) == pytest.approx(rows(two), rel=TO_ROUNDING) and rows(two)[4] < rows(two)[1]
    assert max(export(two, tmp_path / "export").values()) < 1e-4
    left, right = (
        load_file(at / "model.safetensors") for at in (tmp_path / "export", world.root / "reference" / "llm")
    )
    same = {key for key, value in right.items() if torch.equal(left[f"llm.{key}"], value)}
    assert all(("layers.0." in key) == (key in same) for key in right if key.endswith("proj.weight")) == (
        name == "unfrozen"
    )


def test_a_language_model_is_adapted_in_the_first_stage(world: World, tmp_path: Path) -> None:
    """Also where layers are computed again from inputs in host memory, which need a gradient of their own."""
    values: dict[str, object] = {
        "model__llm": f"{{path: {world.root / 'reference' / 'llm'}}}",
        "train__parts": "{llm: {mode: lora, lora_targets: [q_proj, v_proj], lr: 0.003}}",
    }
    two = run(world, "parts-first-2", "continued_pretraining", 2, **values)
    offloaded = {"model__gradient_checkpointing": "true", "continued_pretraining__offload_activations": "true"}
    one = run(world, "parts-first-1", "continued_pretraining", 1, **values, **offloaded)
    assert rows(one) == pytest.approx(rows(two), rel=TO_ROUNDING)
    held_out = rows(two, "eval/loss")
    assert held_out[4] < held_out[0]
    merged, kept = tmp_path / "merged", tmp_path / "kept"
    assert max(export(two, merged).values()) < 1e-4
    assert max(export(two, kept, lora="keep").values()) < 1e-4, "as PEFT computes"
    old, new, apart = (load_file(at / "model.safetensors") for at in (world.root / "reference" / "llm", merged, kept))
    assert old.keys() == new.keys() == apart.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.endswith(("q_proj.weight", "v_proj.weight"))}
    assert all(torch.equal(old[name], apart[name]) for name in old)
