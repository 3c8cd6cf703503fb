"""Micro-batches against the single big batch: equal gradients for token sums and for a loss over all negatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.engine.accumulate import accumulate
from pipeline.losses import sentence_contrastive
from pipeline.stages.base import CachedStage, LossParts, Normaliser, SummedStage

BATCH = 6
NORMALISER = Normaliser(valid_tokens=BATCH, world_size=1)


class Towers(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.video = nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 4))
        self.text = nn.Linear(3, 4)
        self.unused = nn.Linear(4, 4)
        self.log_scale = nn.Parameter(torch.tensor([1.5]))
        self.double()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        video_BE = self.video(batch["video"])
        return {
            "video_BE": video_BE,
            "text_BE": self.text(batch["text"]),
            "unused_BE": self.unused(video_BE),
            "mask_B": torch.ones(len(video_BE), dtype=torch.bool),
            "log_scale": self.log_scale * 1.0,
        }


class Engine:
    """What `TrainEngine` offers, in plain torch; weights never move."""

    def __init__(self, module: nn.Module) -> None:
        self.training_forward = module
        self.calls: list[str] = []

    def backward(self, loss: Tensor) -> None:
        self.calls.append("backward")
        loss.backward()

    def step(self) -> None:
        self.calls.append("step")


class Contrast(CachedStage):
    """The contrastive stage without data and cache: only what `accumulate` calls."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        pass

    def features(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return model(batch)

    def contrast(
        self, features: list[dict[str, Tensor]], batches: list[dict[str, Tensor]], normaliser: Normaliser
    ) -> LossParts:
        video_BE, text_BE = (torch.cat([part[name] for part in features]) for name in ("video_BE", "text_BE"))
        ids_B = torch.cat([batch["ids"] for batch in batches])
        loss = sentence_contrastive((video_BE, text_BE), ids_B, features[0]["log_scale"].exp())
        return LossParts(loss, {"loss": loss.detach() * len(ids_B)})


class TokenSum(SummedStage):
    """A stage whose loss is a sum over tokens."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        pass

    def loss(self, model: Any, batch: dict[str, Tensor], normaliser: Normaliser) -> LossParts:
        loss_sum = model(batch)["video_BE"].square().sum()
        return LossParts(normaliser.scale(loss_sum), {"loss": loss_sum.detach()})


# They answer what `accumulate` asks and nothing else.
Contrast.__abstractmethods__ = frozenset()
TokenSum.__abstractmethods__ = frozenset()


def batches(sizes: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    whole = {
        "video": torch.randn(BATCH, 5, generator=generator, dtype=torch.float64),
        "text": torch.randn(BATCH, 3, generator=generator, dtype=torch.float64),
        "ids": torch.tensor([0, 1, 2, 0, 4, 5]),
    }
    parts = {name: value.split(sizes) for name, value in whole.items()}
    return [{name: part[at] for name, part in parts.items()} for at in range(len(sizes))]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected, "nothing to compare"
    different = {
        n: found.get(n) for n, v in expected.items() if not torch.allclose(found[n], v, rtol=1e-12, atol=1e-14)
    }
    assert not different


def run(stage: Any, sizes: list[int], dropout: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    module = Towers(dropout)
    engine = Engine(module)
    torch.manual_seed(7)
    sums = accumulate(engine, stage, batches(sizes), NORMALISER)  # type: ignore[arg-type]
    return gradients(module), sums, engine.calls


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 1, 1, 1, 1, 1], [4, 2]])
def test_cached_gradients_equal_the_big_batch(sizes: list[int]) -> None:
    expected, big_sums, _ = run(Contrast(), [BATCH])
    found, sums, calls = run(Contrast(), sizes)
    assert calls == ["backward", "step"] * len(sizes), "DeepSpeed counts its micro-batches by these calls"
    torch.testing.assert_close(sums["loss"], big_sums["loss"], rtol=1e-12, atol=0)
    assert_equal(found, expected)
    assert found["log_scale"].abs() > 1e-3, "the temperature learns too, and its gradient is counted once"


def test_every_parameter_is_reached_in_every_micro_batch() -> None:
    """A tensor the loss does not use still runs backward, with zeros: ZeRO's reductions must agree over ranks."""
    found, _, _ = run(Contrast(), [2, 2, 2])
    assert found["unused.weight"].abs().sum() == 0


def test_dropout_of_the_replay_is_that_of_the_first_pass() -> None:
    module = Towers(dropout=0.5)
    parts = batches([2, 2, 2])
    torch.manual_seed(7)
    stage = Contrast()
    stage.contrast([stage.features(module, part) for part in parts], parts, NORMALISER).loss.backward()
    expected, after = gradients(module), torch.rand(3)
    found, _, _ = run(stage, [2, 2, 2], dropout=0.5)
    assert torch.equal(torch.rand(3), after), "one pass's worth of random numbers is used, not two"
    assert_equal(found, expected)
    without, _, _ = run(stage, [2, 2, 2])
    assert not torch.allclose(found["video.0.weight"], without["video.0.weight"]), "the dropout was real"


def test_summed_losses_give_the_mean_over_the_global_batch() -> None:
    module = Towers()
    (module(batches([BATCH])[0])["video_BE"].square().sum() / BATCH).backward()
    found, sums, calls = run(TokenSum(), [3, 1, 2])
    assert calls == ["backward", "step"] * 3
    assert_equal(found, gradients(module))
    whole = module(batches([BATCH])[0])["video_BE"].square().sum().detach()
    torch.testing.assert_close(sums["loss"], whole, rtol=1e-12, atol=0)
    assert not sums["loss"].requires_grad
