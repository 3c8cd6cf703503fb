"""One step of the contrastive stage: the backbone runs no more often than it must, and no device is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import ContrastiveConfig, Recipe
from pipeline.engine.accumulate import accumulate
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.contrastive import ContrastiveModel
from pipeline.models.registry import build_visual
from pipeline.stages.base import Normaliser
from pipeline.stages.contrastive import Contrastive
from pipeline.stages.data import StageContext
from tests.unit.pipeline.models.tiny import PIXELS, clips, model_config, shake, visual_config

CPU = torch.device("cpu")
FRAMES, TOKENS = [5, 9, 3, 12, 7, 4], [2, 5, 1, 3, 4, 4]


class Engine:
    def __init__(self, module: torch.nn.Module) -> None:
        self.training_forward = module

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        pass


def stage_of(folder: Path, train: str, **contrastive: Any) -> Contrastive:
    recipe = Recipe.model_validate(
        {
            "name": "x", "stage": "contrastive", "run_dir": "x", "model": model_config(folder),
            "data": {"train": [{"shards": "x"}]},
            "train": {"global_batch": 6, "micro_batch": 2, "precision": "fp32", "optimizer": {"lr": 1.0}},
            "contrastive": {"embed": 8, **contrastive},
        }
    )  # fmt: skip
    torch.manual_seed(0)
    visual = build_visual(visual_config(), PIXELS, torch.float64)
    module = ContrastiveModel(visual, 4, ContrastiveConfig(embed=8, **contrastive))
    shake(module)
    visual.backbone.requires_grad_(train == "full")
    texts: Any = None
    return Contrastive(StageContext(recipe, 0, 1, CPU), module, texts)


def batches_of(stage: Contrastive, parts: list[list[int]]) -> list[Any]:
    """Micro-batches of these samples."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for number, (frames, tokens) in enumerate(zip(FRAMES, TOKENS, strict=True)):
        text = torch.randn(1 + tokens, 4, generator=generator)
        samples.append((clips(frames, seed=number)[0], text[:1], text[1:]))
    found = []
    for part in parts:
        images, sentences, tokens = zip(*(samples[at] for at in part), strict=True)
        layout = ClipLayout.of([len(frames) for frames in images], stage.module.visual.config.clip_sizes())
        found.append(
            {
                "frames_NHWC": torch.cat(images), "layout": layout, "text_ids_B": torch.tensor([at % 5 for at in part]),
                "text_BD": torch.cat(sentences), "tokens_ND": torch.cat(tokens),
                "token_lengths": [len(rows) for rows in tokens], "word_lengths": layout.word_lengths_B.tolist(),
            }
        )  # fmt: skip
    return found


def step(stage: Contrastive, parts: list[list[int]]) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step, and how often the backbone ran."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = stage.module.visual.backbone.model.register_forward_hook(count)
    stage.module.zero_grad()
    engine: Any = Engine(stage.module)
    accumulate(engine, stage, batches_of(stage, parts), Normaliser(6, 1))
    handle.remove()
    return {n: p.grad.clone() for n, p in stage.module.named_parameters() if p.grad is not None}, calls


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("train", "expected"), [("frozen", 3), ("full", 6)])
def test_a_frozen_backbone_runs_once_per_micro_batch(loss: str, train: str, expected: int, tmp_path: Path) -> None:
    stage = stage_of(tmp_path, train, sentence_loss=loss)
    found, calls = step(stage, [[0, 1], [2, 3], [4, 5]])
    whole, calls_of_whole = step(stage, [[0, 1, 2, 3, 4, 5]])
    assert (calls, calls_of_whole) == (expected, 1)
    assert found.keys() == whole.keys() and ("sentence_bias" in found) == (loss == "sigmoid")
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)


class Waiting(TorchDispatchMode):
    """Operations for which the host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "aten.equal", "is_nonzero")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["sentence", "token", "both"])
def test_nothing_in_a_step_waits_for_a_device(objective: str, tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "frozen", objective=objective)
    batches, engine = batches_of(stage, [[0, 1], [2, 3], [4, 5]]), Engine(stage.module)
    wanted: Any = engine
    with Waiting() as mode:
        accumulate(wanted, stage, batches, Normaliser(6, 1))
    assert mode.seen == []


def test_ranks_with_other_numbers_of_samples_are_refused(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "frozen")
    engine: Any = Engine(stage.module)
    with pytest.raises(
        ValueError, match=r"this rank has 2 of the 5 samples of 2 ranks: every rank must bring the same"
    ):
        accumulate(engine, stage, batches_of(stage, [[0, 1]]), Normaliser(5, 2))
