"""Rules every stage shares: what trains, how sums become the step's loss, what moves to the device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.config.parts_schema import PartConfig
from pipeline.config.schema import LlmConfig, ModelConfig, Recipe
from pipeline.config.stages import STAGES
from pipeline.config.transfer_schema import InitFromConfig
from pipeline.errors import RecipeError
from pipeline.stages import base
from pipeline.stages.base import Normaliser, Stage
from pipeline.stages.batches import MicroBatch, to_device
from pipeline.stages.data import StageContext, held_out_loader
from pipeline.stages.freezing import apply_freeze_plan, check_held, frozen_names
from pipeline.stages.video import probe_frames
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from tests.unit.shards.shard_sets import collate_lists, fetch_numbers, in_memory


def model() -> nn.Module:
    """Two parts; the visual one has a backbone that its builder froze."""
    visual = nn.ModuleDict({"backbone": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    visual["backbone"].requires_grad_(False)
    return nn.ModuleDict({"visual": visual, "llm": nn.Linear(2, 2, bias=False)})


def test_parts_train_as_planned_and_a_frozen_backbone_stays_frozen() -> None:
    module = model()
    assert apply_freeze_plan(module, {"visual": True, "llm": False}) == ["visual.head.weight"]
    assert frozen_names(module) == ["visual.backbone.weight", "llm.weight"]
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["visual.head.weight"]


def test_a_stage_is_frozen_as_planned_once_it_is_constructed() -> None:
    class Frozen(Stage[MicroBatch]):
        def freeze_plan(self) -> dict[str, bool]:
            return {"visual": True, "llm": False}

    Frozen.__abstractmethods__ = frozenset()
    recipe: Any = SimpleNamespace(model=ModelConfig(), train=SimpleNamespace(parts={}), stage="contrastive")
    stage = Frozen(StageContext(recipe, 0, 1, torch.device("cpu")), model())  # type: ignore[abstract]
    assert stage.trainable == ["visual.head.weight"]
    assert frozen_names(stage.module) == ["visual.backbone.weight", "llm.weight"]
    plan = stage.export_plan(prefix="visual.", tied=["head.tied"])
    assert (plan.prefix, plan.tied, plan.frozen, plan.sources) == (
        "visual.",
        ["head.tied"],
        frozen_names(stage.module),
        {},
    )


def test_an_export_plan_names_the_files_that_frozen_parts_were_loaded_from(tmp_path: Path) -> None:
    class Frozen(Stage[MicroBatch]):
        def freeze_plan(self) -> dict[str, bool]:
            return {"visual": True, "llm": False}

    Frozen.__abstractmethods__ = frozenset()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    recipe: Any = SimpleNamespace(
        model=ModelConfig(llm=LlmConfig(path=str(tmp_path))), train=SimpleNamespace(parts={}), stage="contrastive"
    )
    for rank in (0, 1):
        stage = Frozen(StageContext(recipe, rank, 2, torch.device("cpu")), model())  # type: ignore[abstract]
        sources = stage.export_plan(prefix="", tied=[]).sources
        assert {part: list(files) for part, files in sources.items()} == ({"llm": ["model.safetensors"]}, {})[rank]
        if rank == 0:
            assert not stage.changed_source(sources)
            before = {"llm": {"model.safetensors": {"size": 7, "sha256": "another"}}}
            assert stage.changed_source(before).startswith(f"{tmp_path / 'model.safetensors'} has changed since")


def test_an_export_plan_names_what_the_run_started_with_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained parts are in the checkpoint and not loaded again; a frozen one is."""

    class Frozen(Stage[MicroBatch]):
        def freeze_plan(self) -> dict[str, bool]:
            return {"visual": False, "llm": True}

    Frozen.__abstractmethods__ = frozenset()
    (tmp_path / "config.json").write_text('{"model_type": "llava_slt"}')
    module = model()
    save_file({name: value + 1 for name, value in module.state_dict().items()}, tmp_path / "model.safetensors")

    def load(module: nn.Module, config: ModelConfig, only: set[str] | None) -> dict[str, Path]:
        return dict.fromkeys(("visual", "llm") if only is None else sorted(only), tmp_path)

    monkeypatch.setattr(base, "warm_start", load)
    started = ModelConfig(init_from=InitFromConfig(model=str(tmp_path)))
    recipe: Any = SimpleNamespace(model=started, train=SimpleNamespace(parts={}), stage="connector")
    stage = Frozen(StageContext(recipe, 0, 1, torch.device("cpu")), model())  # type: ignore[abstract]
    assert stage.started_from == {"visual": tmp_path, "llm": tmp_path}
    plan = stage.export_plan(prefix="", tied=[])
    assert plan.initial.keys() == {"visual", "llm"} and plan.sources.keys() == {"visual"}
    resumed = StageContext(recipe, 0, 1, torch.device("cpu"), resumed=dataclasses.asdict(plan))
    again = Frozen(resumed, model())  # type: ignore[abstract]
    assert again.started_from == {"visual": tmp_path}
    assert again.export_plan(prefix="", tied=[]) == plan


def test_a_plan_that_trains_nothing_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"the freeze plan \{'visual': False, 'llm': False\} leaves no parameter to train"
    ):
        apply_freeze_plan(model(), {"visual": False, "llm": False})


def test_what_no_folder_holds_may_not_be_frozen_by_a_recipe() -> None:
    """By its stage it may: only the recipe says what is new."""
    module = model()
    apply_freeze_plan(module, {"visual": True, "llm": False})
    check_held(module, {}, ())
    parts = {"llm": PartConfig(mode="lora", lora_rank=1)}
    module = nn.ModuleDict({"visual": model()["visual"], "llm": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    apply_freeze_plan(module, {"visual": True, "llm": False}, parts)
    check_held(module, parts, ("llm.", "visual."))
    message = r"train\.parts\.llm\.mode=lora leaves llm\.q\.base_layer\.weight as it is, but its weights are new"
    with pytest.raises(RecipeError, match=message):
        check_held(module, parts, ("visual.",))


def test_every_part_must_be_decided() -> None:
    with pytest.raises(KeyError, match="llm"):
        apply_freeze_plan(model(), {"visual": True})


@pytest.mark.parametrize("shares", [[[5]], [[2, 1], [0, 2]], [[1], [1], [3]]])
def test_scaled_parts_add_up_to_the_global_mean(shares: list[list[int]]) -> None:
    """Rows of ``shares``: the ranks' token counts per micro-batch. DeepSpeed averages gradients over ranks."""
    values = iter(torch.tensor([3.0, 1.0, 4.0, 1.0, 6.0]))
    normaliser = Normaliser(valid_tokens=5, world_size=len(shares))
    ranks = []
    for counts in shares:
        parts = [sum((next(values) for _ in range(count)), torch.tensor(0.0)) for count in counts]
        ranks.append(torch.stack([normaliser.scale(part) for part in parts]).sum())
    assert torch.stack(ranks).mean().item() == pytest.approx(15.0 / 5)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_held_out_samples_are_limited_by_batches_and_read_by_workers(name: str) -> None:
    """`train.eval_batches` global batches of 8 at any world size, and a stage's own limit where it is smaller."""
    recipe = Recipe.model_validate(
        {
            "name": "x", "stage": name, "run_dir": "x", "model": {}, "data": {"train": [{"shards": "x"}], "workers": 3},
            "train": {"global_batch": 8, "micro_batch": 2, "eval_batches": 2, "optimizer": {"lr": 1.0}},
        }
    )  # fmt: skip
    plan = Plan([Source(in_memory("video", [4] * 30))], PlanOptions("clip", shuffle=False))
    for world_size in (1, 4):
        context = StageContext(recipe, 0, world_size, torch.device("cpu"))
        loader = held_out_loader(context, plan, fetch_numbers, collate_lists)
        assert (loader.workers, loader.n_items, len(loader)) == (3, 16, 8 // world_size)
        assert held_out_loader(context, plan, fetch_numbers, collate_lists, max_samples=5).n_items == 5
        assert held_out_loader(context, plan, fetch_numbers, collate_lists, max_samples=50).n_items == 16


def test_a_batch_without_labels_is_a_loss_of_zero() -> None:
    assert Normaliser(0, 2).scale(torch.tensor(0.0)).item() == 0.0


def test_nested_tensors_move_and_everything_else_stays() -> None:
    rows = [object()]
    batch: dict[str, Any] = {
        "ids": torch.ones(2),
        "packed": {"positions": torch.ones(3), "longest": 3},
        "rows": rows,
        "samples": 2,
    }
    moved = to_device(batch, torch.device("meta"))
    assert moved["ids"].device.type == moved["packed"]["positions"].device.type == "meta"
    assert moved["packed"]["longest"] == 3 and moved["rows"] is rows and moved["samples"] == 2
    assert batch["ids"].device.type == "cpu", "the loader's batch is left as it was"


def test_the_probe_is_the_same_in_every_process() -> None:
    (first, lengths_B), (second, _) = (probe_frames(16, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (int(lengths_B.sum()), 16, 16, 3)
    assert first.dtype == torch.uint8 and len(set(lengths_B.tolist())) == 2, "clips of unlike length"
