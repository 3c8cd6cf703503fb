"""Contrastive gradients at 1, 2 and 3 real gloo ranks equal those of one process with the whole batch, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline import dist
from pipeline.losses import Gather, Tokens, clamped_scale, sentence_contrastive, token_contrastive
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

BATCH = 6
TEXT_IDS = torch.tensor([0, 1, 2, 0, 4, 4])


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.video, self.text = nn.Linear(8, 5).double(), nn.Linear(7, 5).double()
        self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.token_log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def loss(self, rows: slice, gather: Gather, rank: int, row_chunk: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        words_BSD = torch.randn(BATCH, 6, 8, generator=generator, dtype=torch.float64)[rows]
        tokens_BLD = torch.randn(BATCH, 4, 7, generator=generator, dtype=torch.float64)[rows]
        lengths_B = torch.arange(BATCH)[rows]
        words = Tokens(self.video(words_BSD), torch.arange(6) < (1 + lengths_B % 6)[:, None])
        tokens = Tokens(self.text(tokens_BLD), torch.arange(4) < (1 + lengths_B % 4)[:, None])
        scale = clamped_scale(self.log_scale, 100.0)
        sentence = sentence_contrastive(
            words.features_BKE.mean(1), tokens.features_BKE.mean(1), TEXT_IDS[rows], scale, gather, rank, row_chunk
        )
        scales = (scale, self.token_log_scale.exp())
        token = token_contrastive(words, tokens, TEXT_IDS[rows], scales, gather, rank, row_chunk)
        return sentence + 0.5 * token


def _results(model: Towers, loss: Tensor, ranks: int) -> dict[str, Tensor]:
    """Loss and gradients averaged over ranks, as data parallelism does."""
    loss.backward()
    values = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if ranks > 1:
        for value in values.values():
            dist.all_reduce_sum(value)
    return {name: value / ranks for name, value in values.items()}


def _rank_main(rank: int, ranks: int, row_chunk: int) -> dict[str, Tensor]:
    model, size = Towers(), BATCH // ranks
    loss = model.loss(slice(rank * size, (rank + 1) * size), dist.gather_with_grad, rank, row_chunk)
    return _results(model, loss, ranks)


@pytest.mark.parametrize(("ranks", "row_chunk"), [(1, 0), (2, 2), (3, 0)])
def test_gradients_equal_the_big_batch(ranks: int, row_chunk: int) -> None:
    model = Towers()
    expected = _results(model, model.loss(slice(0, BATCH), lambda tensor: tensor, 0, 0), 1)
    assert len(expected) == 1 + len(list(model.parameters()))
    for results in run_ranks(_rank_main, ranks, row_chunk):
        assert results.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(results[name], value, rtol=1e-10, atol=1e-14)
