"""One step of the contrastive stage: the backbone runs no more often than it must, and no device is waited for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import ContrastiveConfig, Recipe
from pipeline.engine.accumulate import accumulate
from pipeline.losses import Tokens
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.contrastive import ContrastiveModel
from pipeline.models.gloss_vocabulary import GlossVocabulary
from pipeline.models.registry import build_visual
from pipeline.stages.base import Normaliser
from pipeline.stages.contrastive import Contrastive
from pipeline.stages.data import StageContext
from pipeline.stages.glosses import GlossTargets
from tests.contrast_reference import whole_ctc, whole_gloss_set, whole_sentences, whole_tokens
from tests.unit.pipeline.models.tiny import PIXELS, clips, model_config, shake, visual_config

CPU = torch.device("cpu")
FRAMES, TOKENS = [5, 9, 3, 12, 7, 4], [2, 5, 1, 3, 4, 4]
GLOSSES = ["A", "B A C", "", "C C", "B", "A"]
"""Of clips of 2, 3, 1, 3, 2 and 1 word tokens: the third has none, and the others just fit."""
SUPERVISED = {
    "ctc": {"ctc": {"weight": 0.7, "unusable": "leave_out"}},
    "set": {"ctc": {"weight": 0.7, "set_weight": 0.3, "order": "video", "unusable": "leave_out"}},
    "levels": {"objective": "sentence", "alignment": {"frame_weight": 0.5, "segment_weight": 2.0}},
}


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
    config = ContrastiveConfig(embed=8, **contrastive)
    targets = GlossTargets(GlossVocabulary.of(GLOSSES), config.ctc) if config.ctc.used else None
    module = ContrastiveModel(visual, 4, config, len(targets.vocabulary) if targets else 0)
    shake(module)
    visual.backbone.requires_grad_(train == "full")
    texts: Any = None
    return Contrastive(StageContext(recipe, 0, 1, CPU), module, texts, targets)


def batches_of(stage: Contrastive, parts: list[list[int]]) -> list[Any]:
    """Micro-batches of these samples."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for number, (frames, tokens) in enumerate(zip(FRAMES, TOKENS, strict=True)):
        text = torch.randn(1 + tokens, 4, generator=generator)
        samples.append((clips(frames, seed=number)[0], text[:1], text[1:]))
    gloss_tokens = [torch.randn(1 + number % 3, 4, generator=generator) for number in range(6)]
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
        if stage.targets is not None:
            rows: Any = [SimpleNamespace(gloss=GLOSSES[at]) for at in part]
            found[-1] |= stage.targets.batch(rows, found[-1]["word_lengths"])
        if stage.recipe.contrastive.alignment.used:
            found[-1] |= {
                "gloss_ids_B": torch.tensor([at % 4 for at in part]), "frame_lengths": [len(rows) for rows in images],
                "gloss_tokens_ND": torch.cat([gloss_tokens[at] for at in part]),
                "gloss_token_lengths": [len(gloss_tokens[at]) for at in part],
            }  # fmt: skip
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


@pytest.mark.parametrize("settings", SUPERVISED.values(), ids=SUPERVISED)
@pytest.mark.parametrize("train", ["frozen", "full"])
def test_supervision_by_glosses_does_not_depend_on_micro_batches(
    train: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    stage = stage_of(tmp_path, train, **settings)
    found, _ = step(stage, [[0, 1], [2, 3], [4, 5]])
    whole, _ = step(stage, [[0, 1, 2, 3, 4, 5]])
    assert found.keys() == whole.keys()
    heads = {"frame_head.weight"} if "alignment" in settings else {"gloss_head.weight", "gloss_head.bias"}
    assert heads <= whole.keys() and all(whole[name].any() for name in heads)
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("settings", SUPERVISED.values(), ids=SUPERVISED)
def test_the_losses_are_those_of_their_definitions(settings: dict[str, Any], tmp_path: Path) -> None:
    """In float64, with everything in memory at once."""
    stage = stage_of(tmp_path, "full", **settings, token_weight=0.1)
    (batch,) = batches_of(stage, [[0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        found = stage.features(stage.module, batch)
        losses = stage.contrast([found], [batch], Normaliser(6, 1))
    scales = (found["log_scale"].exp(), found["log_token_scale"].exp())
    words = Tokens(found["words_ME"], batch["word_lengths"])
    expected = {"sentence": whole_sentences(found["video_BE"], found["text_BE"], batch["text_ids_B"], scales[0])}
    if "alignment" in settings:
        glosses = (Tokens(found["gloss_tokens_NE"], batch["gloss_token_lengths"]), batch["gloss_ids_B"], scales)
        expected["frame"] = whole_tokens(Tokens(found["frames_NE"], batch["frame_lengths"]), *glosses)
        expected["segment"] = whole_tokens(words, *glosses)
    else:
        tokens = Tokens(found["tokens_NE"], batch["token_lengths"])
        expected["token"] = whole_tokens(words, tokens, batch["text_ids_B"], scales)
        logits = Tokens(found["glosses_MV"], batch["word_lengths"])
        classes = [part.tolist() for part in batch["gloss_classes_N"].split(batch["gloss_lengths"])]
        if "set_weight" in settings["ctc"]:
            expected["set"] = whole_gloss_set(logits, classes)
        else:
            expected["ctc"] = whole_ctc(logits, classes)
    for name, value in expected.items():
        torch.testing.assert_close(losses.sums[f"{name}_loss"] / 6, value.squeeze(), rtol=1e-10, atol=1e-12)


def test_the_weighted_sum_and_the_clips_left_out_are_reported(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "full", **SUPERVISED["set"], token_weight=0.1)
    batches = batches_of(stage, [[0, 1, 2, 3, 4, 5]])
    losses = stage.contrast([stage.features(stage.module, batches[0])], batches, Normaliser(6, 1))
    found = stage.reduce({name: float(value) for name, value in losses.sums.items()})
    parts = {"sentence_loss": 1.0, "token_loss": 0.1, "ctc_loss": 0.7, "set_loss": 0.3}
    assert found.keys() == {"loss", "logit_scale", "gloss_left_out", *parts}
    assert found["loss"] == pytest.approx(sum(weight * found[name] for name, weight in parts.items()))
    assert found["gloss_left_out"] == pytest.approx(1 / 6), "one clip has no glosses"


def test_ctc_begins_at_its_step(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "full", ctc={"weight": 0.7, "unusable": "leave_out", "start_step": 5})
    batches = batches_of(stage, [[0, 1, 2, 3, 4, 5]])
    features = [stage.features(stage.module, batches[0])]
    before, after = (stage.contrast(features, batches, Normaliser(6, 1, step=step)).sums for step in (4, 5))
    assert before["ctc_loss"] == after["ctc_loss"] > 0, "shown all the time"
    assert float(after["loss"] - before["loss"]) == pytest.approx(0.7 * float(after["ctc_loss"]))


class Waiting(TorchDispatchMode):
    """Operations for which the host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "aten.equal", "is_nonzero")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings", [{"objective": "sentence"}, {"objective": "token"}, {"objective": "both"}, *SUPERVISED.values()]
)
def test_nothing_in_a_step_waits_for_a_device(settings: dict[str, Any], tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "frozen", **settings)
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
