"""Held-out retrieval follows the objective: what has no loss decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import ContrastiveConfig, Recipe
from pipeline.errors import DivergedError
from pipeline.stages import held_out_retrieval
from pipeline.stages.contrastive import Contrastive
from pipeline.stages.data import StageContext
from pipeline.stages.held_out_retrieval import held_out_metrics, pairs_of
from tests.unit.pipeline.models.tiny import model_config

CPU = torch.device("cpu")
IDS_B = torch.arange(4)


def features(sentence_right: bool, token_right: bool) -> dict[str, Tensor]:
    """Four samples of two word tokens and one text token; one kind of embedding finds every partner, the other one
    none."""
    eye, shifted = torch.eye(4), torch.eye(4).roll(1, 0)
    return {
        "video_BE": eye, "text_BE": eye if sentence_right else shifted,
        "words_ME": torch.stack([eye, torch.ones(4, 4)], dim=1).flatten(0, 1),
        "tokens_NE": eye if token_right else shifted,
        "log_scale": torch.zeros(1), "log_token_scale": torch.zeros(1),
    }  # fmt: skip


def metrics(found: dict[str, Tensor], **config: Any) -> dict[str, float]:
    settings = ContrastiveConfig(**config)
    lengths = {"word_lengths": [2] * 4, "token_lengths": [len(found["tokens_NE"]) // 4] * 4}
    return held_out_metrics(pairs_of(found, {"text_ids_B": IDS_B, **lengths}, settings), settings, 1.0, CPU)


@pytest.mark.parametrize(("objective", "other"), [("sentence", "token"), ("token", "sentence")])
def test_one_objective_is_scored_by_its_own_similarity_alone(objective: str, other: str) -> None:
    right = metrics(features(objective == "sentence", objective == "token"), objective=objective)
    wrong = metrics(features(other == "sentence", other == "token"), objective=objective)
    for direction in ("video_to_text", "text_to_video"):
        assert (right[f"{direction}/r1"], wrong[f"{direction}/r1"]) == (100.0, 0.0)
    assert right[f"{objective}/video_to_text/r1"] == 100.0
    assert not [name for name in right if name.startswith(f"{other}/")], "what is not trained has no name"


def test_both_is_the_sum_with_the_weights_of_the_loss() -> None:
    found = features(sentence_right=True, token_right=False)
    light, heavy = (metrics(found, objective="both", token_weight=weight) for weight in (0.5, 4.0))
    assert (light["video_to_text/r1"], heavy["video_to_text/r1"]) == (100.0, 0.0)
    for one in (light, heavy):
        assert (one["sentence/video_to_text/r1"], one["token/video_to_text/r1"]) == (100.0, 0.0)


def test_token_scores_in_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    found = features(True, True) | {
        "words_ME": torch.randn(8, 6, generator=generator), "tokens_NE": torch.randn(12, 6, generator=generator)
    }  # fmt: skip
    whole = metrics(found, objective="token")
    monkeypatch.setattr(held_out_retrieval, "MAX_SIMILARITIES", 1)
    assert metrics(found, objective="token") == whole


def test_similarities_that_are_not_finite_are_no_ranking() -> None:
    found = features(True, True) | {"tokens_NE": torch.full((4, 4), torch.nan)}
    with pytest.raises(DivergedError, match=r"similarities of samples 0\.\.3 hold NaN or infinity"):
        metrics(found, objective="token")


def batches() -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Two batches and one that only fills up, as a rank with fewer samples gets it."""
    for samples in ([0, 2], [1, 3], []):
        rows = samples or [0, 2]
        lengths = {"word_lengths": [2] * len(rows), "token_lengths": [1] * len(rows)}
        yield {"rows": torch.tensor(rows), "text_ids_B": torch.tensor(rows), **lengths}, samples


@pytest.mark.parametrize(("objective", "r1"), [("sentence", 0.0), ("token", 100.0)])
def test_the_stage_chooses_its_checkpoint_by_what_it_trains(
    objective: str, r1: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x", "stage": "contrastive", "run_dir": "x", "model": model_config(tmp_path),
            "data": {"train": [{"shards": "x"}], "eval": [{"shards": "x", "split": "dev"}]},
            "train": {"global_batch": 4, "micro_batch": 2, "precision": "fp32", "optimizer": {"lr": 1.0}},
            "contrastive": {"objective": objective},
        }
    )  # fmt: skip
    module: Any = torch.nn.ModuleDict({"visual": torch.nn.Linear(1, 1)})
    texts: Any = None
    stage = Contrastive(StageContext(recipe, 0, 1, CPU), module, texts)
    found = features(sentence_right=False, token_right=True)
    monkeypatch.setattr(stage, "held_out_collate", lambda: None)
    monkeypatch.setattr(stage, "held_out", lambda sources, collate, stop_requested: batches())
    monkeypatch.setattr(
        stage,
        "features",
        lambda model, batch: {
            n: v if n.startswith("log") else v.unflatten(0, (4, -1))[batch["rows"]].flatten(0, 1)
            for n, v in found.items()
        },
    )
    measured = stage.evaluate(lambda: None, lambda: False)
    assert stage.best_metric == ("eval/video_to_text/r1", "max")
    assert measured["eval/video_to_text/r1"] == measured[f"eval/{objective}/video_to_text/r1"] == r1
