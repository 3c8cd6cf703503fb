"""The contrastive model's text side: features are centred and scaled by statistics of the whole cache."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.config.schema import ContrastiveConfig
from pipeline.models import text_cache
from pipeline.models.contrastive import ContrastiveModel
from pipeline.models.registry import build_visual
from pipeline.models.text_cache import TextFeatureCache
from pipeline.models.text_encoder import TextFeatures
from shards.schema import text_hash
from tests.unit.pipeline.models.tiny import PIXELS, clips, visual_config

FEATURES = {
    "a": ([1.0, 2.0], [[1.0, 1.0]]),
    "b": ([3.0, 6.0], [[3.0, 1.0], [5.0, 1.0], [7.0, 5.0]]),
}


class TableEncoder:
    """Looks features up; what `TextFeatureCache` needs of an encoder."""

    def __init__(self, features: dict[str, Any] = FEATURES) -> None:
        self.features = features
        self.fingerprint = "f" * 64

    def encode(self, texts: list[str]) -> TextFeatures:
        return TextFeatures(
            [torch.tensor(self.features[text][1]) for text in texts],
            torch.tensor([self.features[text][0] for text in texts]),
        )


def table_of(*texts: str) -> pa.Table:
    return pa.table({"text": texts, "text_hash": [text_hash(text) for text in texts]})


def cached(folder: Path, encoder: TableEncoder, texts: pa.Table) -> TextFeatureCache:
    cache = TextFeatureCache(folder)
    cache.build(texts, encoder)  # type: ignore[arg-type]
    return cache


def contrastive() -> ContrastiveModel:
    torch.manual_seed(0)
    return ContrastiveModel(build_visual(visual_config(), PIXELS, torch.float32), 2, ContrastiveConfig(embed=4)).eval()


def test_statistics_by_hand(tmp_path: Path) -> None:
    found = cached(tmp_path, TableEncoder(), table_of("a", "b")).statistics()
    # sentences: mean (2, 4), deviations (-1, -2) and (1, 2): mean square 2.5
    torch.testing.assert_close(found["sentence_mean"], torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(found["sentence_scale"], torch.tensor([1 / math.sqrt(2.5)]))
    # all four tokens: mean (4, 2), squares 9+1, 1+1, 1+1, 9+9 over eight numbers
    torch.testing.assert_close(found["tokens_mean"], torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(found["tokens_scale"], torch.tensor([1 / math.sqrt(32 / 8)]))
    assert all(value.dtype == torch.float32 for value in found.values())


def test_statistics_do_not_depend_on_how_the_cache_was_written(tmp_path: Path) -> None:
    encoder = TableEncoder()
    cached(tmp_path / "parts", encoder, table_of("a"))
    parts = cached(tmp_path / "parts", encoder, table_of("a", "b"))
    assert len(list((tmp_path / "parts").glob("*/texts-*"))) == 2
    once = cached(tmp_path / "once", encoder, table_of("b", "a"))
    for name, value in once.statistics().items():
        torch.testing.assert_close(parts.statistics()[name], value)


def test_memory_does_not_grow_with_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for building it, nor for its statistics or a look-up; pieces give what the whole gives. NumPy reports its
    memory to tracemalloc."""
    generator = torch.Generator().manual_seed(0)
    features = {
        f"text {n}": ((torch.randn(64, generator=generator) + 3).tolist(), torch.full((90, 64), float(n)).tolist())
        for n in range(80)
    }
    texts = table_of(*features)
    monkeypatch.setattr(text_cache, "TEXTS_PER_WRITE", 2)
    tracemalloc.start()
    cache = cached(tmp_path, TableEncoder(features), texts)
    found = cache.statistics()
    cache.lookup([text_hash("text 3"), text_hash("text 70")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600_000 < 80 * 90 * 64 * 4, "a third of the token file"
    sentences = torch.tensor([values for values, _ in features.values()], dtype=torch.float64)
    deviation = (sentences - sentences.mean(0)).square().mean().sqrt()
    torch.testing.assert_close(found["sentence_mean"].double(), sentences.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["sentence_scale"].double(), 1 / deviation[None], rtol=1e-6, atol=0)
    assert found["tokens_mean"].tolist() == [39.5] * 64
    assert found["tokens_scale"].item() == pytest.approx(1 / math.sqrt((80**2 - 1) / 12), rel=1e-6)


def test_equal_features_have_no_scale_to_divide_by(tmp_path: Path) -> None:
    encoder = TableEncoder({"a": ([1.0, 1.0], [[2.0, 2.0]]), "b": ([1.0, 1.0], [[2.0, 2.0]])})
    found = cached(tmp_path, encoder, table_of("a", "b")).statistics()
    assert all(torch.isfinite(value).all() for value in found.values())


@torch.no_grad()
def test_text_features_are_centred_and_scaled(tmp_path: Path) -> None:
    model, cache = contrastive(), cached(tmp_path, TableEncoder(), table_of("a", "b"))
    text_BD, tokens_ND, _ = cache.lookup(cache.first(2))
    before = model(*clips(5, 3), text_BD, tokens_ND)
    torch.testing.assert_close(before["text_BE"], text_BD @ model.text_sentence_head.weight.T, msg="as they are")
    model.set_text_statistics(cache.statistics())
    after = model(*clips(5, 3), text_BD, tokens_ND)
    sentences_BD = (text_BD - torch.tensor([2.0, 4.0])) / math.sqrt(2.5)
    torch.testing.assert_close(after["text_BE"], sentences_BD @ model.text_sentence_head.weight.T)
    assert after["text_BE"].sum(0).abs().max() < 1e-5, "over the whole cache the features now have no common part"
    tokens_ND = (tokens_ND - torch.tensor([4.0, 2.0])) / 2.0
    torch.testing.assert_close(after["tokens_NE"], tokens_ND @ model.text_token_head.weight.T)
    assert torch.equal(after["video_BE"], before["video_BE"])


def test_statistics_are_saved_but_not_trained(tmp_path: Path) -> None:
    model, statistics = contrastive(), cached(tmp_path, TableEncoder(), table_of("a", "b")).statistics()
    model.set_text_statistics(statistics)
    assert statistics.keys() <= model.state_dict().keys()
    assert not statistics.keys() & dict(model.named_parameters()).keys()
    again = contrastive()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.tokens_mean, statistics["tokens_mean"])


def test_initial_temperature() -> None:
    output = contrastive()(*clips(2), torch.zeros(1, 2), torch.zeros(3, 2))
    assert output["log_scale"].exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert output["log_scale"].shape == output["log_token_scale"].shape == (1,)
    assert (
        output["words_ME"].shape == (1, 4)
        and output["tokens_NE"].shape == (3, 4)
        and output["video_BE"].shape == (1, 4)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_parameters_have_the_encoders_precision(dtype: torch.dtype) -> None:
    """ZeRO-3 refuses a model of two; the text statistics keep theirs."""
    model = ContrastiveModel(build_visual(visual_config(), PIXELS, dtype), 2, ContrastiveConfig(embed=4))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {getattr(model, name).dtype for name in ("sentence_mean", "tokens_scale")} == {torch.float32}


def test_the_sigmoid_alone_has_a_bias() -> None:
    """So a checkpoint of the softmax fits its own model as before."""
    softmax = contrastive()
    sigmoid = ContrastiveModel(
        build_visual(visual_config(), PIXELS, torch.float32), 2, ContrastiveConfig(embed=4, sentence_loss="sigmoid")
    )
    assert sigmoid.state_dict().keys() - softmax.state_dict().keys() == {"sentence_bias"}
    output = sigmoid(*clips(2), torch.zeros(1, 2), torch.zeros(3, 2))
    assert output["sentence_bias"].tolist() == [-10.0] and "sentence_bias" not in softmax.learned_numbers


@torch.no_grad()
def test_a_frozen_backbones_output_takes_the_place_of_its_images() -> None:
    model = contrastive()
    (frames_NHWC, lengths_B), texts = clips(5, 3), (torch.zeros(2, 2), torch.zeros(3, 2))
    assert "pooled_NP" not in model(frames_NHWC, lengths_B, *texts), "it trains, so every pass has its own"
    model.visual.backbone.requires_grad_(False)
    first = model(frames_NHWC, lengths_B, *texts)
    again = model(first.pop("pooled_NP"), lengths_B, *texts)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_a_frozen_encoder_drops_nothing_out() -> None:
    model = ContrastiveModel(build_visual(visual_config(dropout=0.5), PIXELS, torch.float32), 2, ContrastiveConfig())
    assert model.train().visual.training
    model.visual.requires_grad_(False)
    assert model.train().training and not model.visual.training
