"""Contrastive training at 1, 2 and 3 real gloo ranks equals one process with the whole batch: to the last digits
in fp64, where gradients are averaged here, and in fp32 as real ZeRO engines average and apply them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import dist
from pipeline.losses import Tokens, clamped_scale, sentence_contrastive, token_contrastive
from pipeline.losses.gloss import Glosses, ctc, gloss_loss, gloss_set
from tests.contrast_reference import whole_ctc, whole_gloss_set, whole_sentences, whole_sigmoid, whole_tokens
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

BATCH, STEPS, LR = 6, 3, 0.05
TEXT_IDS = torch.tensor([0, 1, 2, 0, 4, 4])
WORDS, TOKENS = [1 + n % 6 for n in range(BATCH)], [1 + n % 4 for n in range(BATCH)]
GLOSSES = [[1], [2, 1], [3], [], [2, 2, 1], [1, 3]]
"""Of every sample; ranks have different numbers of samples without."""


class Towers(nn.Module):
    """Both towers and every loss; `whole` is the definition."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.video, self.text = nn.Linear(8, 5), nn.Linear(7, 5)
        self.log_scale, self.token_log_scale = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([1.5]))
        self.bias = nn.Parameter(torch.tensor([-3.0]))
        self.gloss = nn.Linear(8, 4)
        self.to(dtype)

    def forward(self, rows: slice) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        words_MD, tokens_ND = (
            torch.randn(sum(lengths), width, generator=generator, dtype=torch.float64).to(self.bias.dtype)
            for lengths, width in ((WORDS, 8), (TOKENS, 7))
        )
        own_MD = torch.cat(words_MD.split(WORDS)[rows])
        words, logits = (Tokens(head(own_MD), WORDS[rows]) for head in (self.video, self.gloss))
        tokens = Tokens(self.text(torch.cat(tokens_ND.split(TOKENS)[rows])), TOKENS[rows])
        sides = tuple(torch.stack([part.mean(0) for part in t.features_NE.split(t.lengths)]) for t in (words, tokens))
        numbers = (clamped_scale(self.log_scale, 100.0), self.token_log_scale.exp(), self.bias * 1.0)
        return {"tokens": (words, tokens), "sides": sides, "numbers": numbers, "ids": TEXT_IDS[rows],
                "glosses": (logits, GLOSSES[rows])}  # fmt: skip

    def loss(self, found: dict[str, Any], tile_numbers: int) -> Tensor:
        (scale, token_scale, bias), ids_B = found["numbers"], found["ids"]
        tail = (dist, tile_numbers)
        sentence = sentence_contrastive(found["sides"], ids_B, scale, None, *tail)
        sigmoid = sentence_contrastive(found["sides"], ids_B, scale, bias, *tail)
        token = token_contrastive(*found["tokens"], ids_B, (scale, token_scale), *tail)
        logits, own = found["glosses"]
        glosses = Glosses(torch.tensor([k for ks in own for k in ks], dtype=torch.int64), [len(ks) for ks in own])
        by_gloss = 0.7 * gloss_loss(logits, glosses, ctc, *tail) + 0.2 * gloss_loss(logits, glosses, gloss_set, *tail)
        return sentence + 0.3 * sigmoid + 0.5 * token + by_gloss

    def whole(self, found: dict[str, Any]) -> Tensor:
        (scale, token_scale, bias), ids_B = found["numbers"], found["ids"]
        sentence, sigmoid = (
            whole_sentences(*found["sides"], ids_B, scale),
            whole_sigmoid(*found["sides"], ids_B, scale, bias),
        )
        token = whole_tokens(*found["tokens"], ids_B, (scale, token_scale))
        by_gloss = 0.7 * whole_ctc(*found["glosses"]) + 0.2 * whole_gloss_set(*found["glosses"])
        return sentence + 0.3 * sigmoid + 0.5 * token + by_gloss


Step = dict[str, Tensor]
"""Loss, and weights before the step."""


def _descend(model: Towers, loss_of: Callable[[], Tensor], ranks: int) -> list[Step]:
    """Plain gradient descent, losses and gradients averaged over ranks."""
    steps = []
    for _ in range(STEPS):
        loss, parameters = loss_of(), dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        steps.append(
            {"loss": dist.all_reduce_sum(loss.detach().clone()) / ranks}
            | {name: parameter.detach().clone() for name, parameter in parameters.items()}
        )
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.data -= LR / ranks * dist.all_reduce_sum(gradient.contiguous())
    return steps


def _train(rows: slice, ranks: int, tile_numbers: int, zero_stage: int) -> list[Step]:
    """The same in a ZeRO engine."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": zero_stage, "reduce_bucket_size": 1000000, "stage3_param_persistence_threshold": 0,
        },
    }  # fmt: skip
    model, steps = Towers(torch.float32), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(STEPS):
        loss = model.loss(engine(rows), tile_numbers)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=zero_stage == 3):
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        steps.append({"loss": dist.all_reduce_sum(loss.detach().clone()) / ranks} | weights)
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return steps


def _rank_main(rank: int, ranks: int, tile_numbers: int) -> dict[int, list[Step]]:
    """By ZeRO stage; 0 is no engine, in fp64."""
    dist.init()
    size = BATCH // ranks
    rows = slice(rank * size, (rank + 1) * size)
    model = Towers()
    exact = _descend(model, lambda: model.loss(model(rows), tile_numbers), ranks)
    return {0: exact} | {stage: _train(rows, ranks, tile_numbers, stage) for stage in (1, 2, 3)}


@pytest.mark.parametrize(("ranks", "tile_numbers"), [(1, 1 << 20), (2, 16), (3, 1 << 20)])
def test_ranks_train_like_the_big_batch(ranks: int, tile_numbers: int) -> None:
    model = Towers()
    expected = _descend(model, lambda: model.whole(model(slice(0, BATCH))), 1)
    for result in run_ranks(_rank_main, ranks, tile_numbers, timeout=240):
        for stage, steps in result.items():
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if stage else {"rtol": 1e-12, "atol": 1e-14}
            for found, wanted in zip(steps, expected, strict=True):
                assert found.keys() == wanted.keys()
                for name, value in wanted.items():
                    torch.testing.assert_close(found[name].double(), value, **tolerance)
