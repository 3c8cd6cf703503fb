"""Candidates are drawn from the model's distribution, and every one of them by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.inference.sample import InverseDraw, numbers_of

ROWS: list[Any] = [SimpleNamespace(corpus="c", sample_id=str(number)) for number in range(3)]


def test_numbers_belong_to_seed_step_sample_candidate_and_place() -> None:
    """Neither the other samples of the micro-batch nor their order matter; more candidates leave the first as they
    were, and every candidate has numbers of its own."""
    numbers = numbers_of(1, 5, ROWS, 4, 6).view(3, 4, 6)
    assert torch.equal(numbers_of(1, 5, ROWS[::-1], 4, 6).view(3, 4, 6), numbers.flip(0))
    assert torch.equal(numbers_of(1, 5, ROWS[1:2], 2, 6), numbers[1, :2])
    assert numbers.unique().numel() == numbers.numel()
    assert bool((numbers >= 0).all() and (numbers < 1).all())
    for other in (numbers_of(2, 5, ROWS, 4, 6), numbers_of(1, 6, ROWS, 4, 6)):
        assert not torch.isin(other, numbers).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_are_likely(temperature: float) -> None:
    logits = torch.tensor([1.0, -0.5, -torch.inf, 2.0, 0.0])
    expected = (logits / temperature).softmax(0)
    numbers = (torch.arange(10000).double()[:, None] + 0.5) / 10000
    draw = InverseDraw(numbers, temperature)
    drawn = draw(torch.empty(10000, 0), logits.expand(10000, 5)).argmax(1)
    torch.testing.assert_close(drawn.bincount(minlength=5) / 10000, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(draw.log_probs[0].exp(), expected[drawn])


def test_a_number_next_to_one_finds_a_token_and_the_place_chooses_the_number() -> None:
    numbers = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64)
    draw, logits = InverseDraw(numbers, 1.0), torch.zeros(1, 3)
    assert draw(torch.empty(1, 0), logits).argmax().item() == 0
    assert draw(torch.empty(1, 1), logits).argmax().item() == 2
