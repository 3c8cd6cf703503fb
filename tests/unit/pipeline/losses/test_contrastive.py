"""Contrastive losses against hand-computed values, a plain reference, and the single-process big batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses import (
    Tokens,
    clamped_scale,
    sentence_contrastive,
    token_contrastive,
)

Loss = Callable[..., Tensor]


class Group(NamedTuple):
    """How a rank sees the others."""

    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    rank: int = 0


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- contrastive: values


def test_sentence_by_hand() -> None:
    video = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    text = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    cosine = math.sqrt(0.5)

    def cross_entropy(right: float, wrong: float) -> float:
        return math.log(1 + math.exp(2 * (wrong - right)))

    rows = [
        cross_entropy(1, cosine),  # video 0: text 0 against text 1
        cross_entropy(cosine, 0),  # video 1
        cross_entropy(1, 0),  # text 0: video 0 against video 1
        cross_entropy(cosine, cosine),  # text 1
    ]
    loss = sentence_contrastive(video, text, torch.tensor([0, 1]), torch.tensor(2.0))
    assert loss.item() == pytest.approx(sum(rows) / 4, rel=1e-6)


def reference_token_scores(words: Tokens, tokens: Tokens, token_scale: float) -> tuple[Tensor, Tensor]:
    """The definition, pair by pair, without masks."""
    size = len(words.features_BKE)
    video_to_text, text_to_video = torch.zeros(size, size).double(), torch.zeros(size, size).double()
    for i in range(size):
        for j in range(size):
            word = F.normalize(words.features_BKE[i][words.mask_BK[i]], dim=-1)
            token = F.normalize(tokens.features_BKE[j][tokens.mask_BK[j]], dim=-1)
            similarity = word @ token.T
            video_to_text[i, j] = (similarity * (token_scale * similarity).softmax(1)).sum(1).mean()
            text_to_video[i, j] = (similarity * (token_scale * similarity).softmax(0)).sum(0).mean()
    return video_to_text, text_to_video


def ragged(batch: int, length: int, seed: int) -> Tokens:
    lengths = torch.tensor([1 + (3 * i + seed) % length for i in range(batch)])
    return Tokens(rand(batch, length, 5, seed=seed), torch.arange(length) < lengths[:, None])


def test_token_level_against_its_definition() -> None:
    words, tokens = ragged(4, 6, 1), ragged(4, 3, 2)
    video_to_text, text_to_video = reference_token_scores(words, tokens, 5.0)
    target = torch.arange(4)
    expected = (F.cross_entropy(7 * video_to_text, target) + F.cross_entropy(7 * text_to_video.T, target)) / 2
    loss = token_contrastive(words, tokens, target, (torch.tensor(7.0), 5.0))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)


def test_padding_does_not_matter() -> None:
    words, tokens = ragged(4, 6, 1), ragged(4, 3, 2)
    padded = Tokens(
        torch.cat([tokens.features_BKE, torch.full((4, 5, 5), 1e3).double()], 1), F.pad(tokens.mask_BK, (0, 5))
    )
    ids = torch.arange(4)
    plain, more = (token_contrastive(words, side, ids, (torch.tensor(7.0), 5.0)) for side in (tokens, padded))
    torch.testing.assert_close(plain, more, rtol=1e-12, atol=0.0)


def test_a_sample_without_tokens_gives_no_nan() -> None:
    words, tokens = ragged(3, 4, 1), ragged(3, 3, 2)
    empty = Tokens(tokens.features_BKE.requires_grad_(), tokens.mask_BK & (torch.arange(3) > 0)[:, None])
    loss = token_contrastive(words, empty, torch.arange(3), (torch.tensor(7.0), 5.0))
    loss.backward()
    assert tokens.features_BKE.grad is not None
    assert loss.isfinite() and tokens.features_BKE.grad.isfinite().all()


# --- contrastive: properties of both objectives


def both_objectives(batch: int, ids: list[int]) -> tuple[dict[str, Loss], list[Tensor]]:
    """Losses of rows [start, start + B/R) for a group, and every leaf that receives gradients."""
    video, text = rand(batch, 5, seed=3).requires_grad_(), rand(batch, 5, seed=4).requires_grad_()
    words, tokens = ragged(batch, 6, 5), ragged(batch, 4, 6)
    words.features_BKE.requires_grad_(), tokens.features_BKE.requires_grad_()
    log_scale = torch.tensor(2.0, dtype=torch.float64).requires_grad_()
    token_scale = torch.tensor(4.0, dtype=torch.float64).requires_grad_()
    id_tensor = torch.tensor(ids)

    def rows_of(group: Group, ranks: int) -> slice:
        size = batch // ranks
        return slice(group.rank * size, (group.rank + 1) * size)

    def sentence(ranks: int, group: Group, row_chunk: int = 0) -> Tensor:
        rows = rows_of(group, ranks)
        return sentence_contrastive(video[rows], text[rows], id_tensor[rows], log_scale.exp(), *group, row_chunk)

    def token(ranks: int, group: Group, row_chunk: int = 0) -> Tensor:
        rows = rows_of(group, ranks)
        local_words = Tokens(words.features_BKE[rows], words.mask_BK[rows])
        local_tokens = Tokens(tokens.features_BKE[rows], tokens.mask_BK[rows])
        return token_contrastive(
            local_words, local_tokens, id_tensor[rows], (log_scale.exp(), token_scale), *group, row_chunk
        )

    leaves = [video, text, words.features_BKE, tokens.features_BKE, log_scale, token_scale]
    return {"sentence": sentence, "token": token}, leaves


def simulate_ranks(loss: Loss, ranks: int) -> Tensor:
    """Mean over ranks of the local losses, in one process: first record what each rank gathers, then deliver it."""
    gathered: list[list[Tensor]] = []
    for _ in range(ranks):
        calls: list[Tensor] = []

        def record(tensor: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(tensor)
            return tensor.repeat(ranks, *[1] * (tensor.dim() - 1))

        loss(ranks, Group(record, len(gathered)))
        gathered.append(calls)
    losses = []
    for rank in range(ranks):
        everyone = iter(list(zip(*gathered, strict=True)))

        def deliver(_: Tensor, everyone: Iterator[tuple[Tensor, ...]] = everyone) -> Tensor:
            return torch.cat(next(everyone))

        losses.append(loss(ranks, Group(deliver, rank)))
    return torch.stack(losses).mean()


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)
    ]


@pytest.mark.parametrize("name", ["sentence", "token"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_the_big_batch(name: str, ranks: int) -> None:
    losses, leaves = both_objectives(6, [0, 1, 2, 0, 4, 4])
    whole = losses[name](1, Group())
    split = simulate_ranks(losses[name], ranks)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=0.0)
    for grad, wanted in zip(gradients(split, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["sentence", "token"])
@pytest.mark.parametrize("row_chunk", [1, 4, 6, 9])
def test_row_chunks_change_nothing(name: str, row_chunk: int) -> None:
    losses, leaves = both_objectives(6, [0, 1, 2, 0, 4, 4])
    whole = losses[name](1, Group())
    chunked = losses[name](1, Group(), row_chunk)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0.0)
    for grad, wanted in zip(gradients(chunked, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["sentence", "token"])
def test_equal_texts_are_no_negatives(name: str) -> None:
    all_equal, leaves = both_objectives(6, [7] * 6)
    loss = all_equal[name](1, Group())
    assert loss.item() == 0.0  # every row has its positive alone
    assert not any(grad.any() for grad in gradients(loss, leaves))
    distinct, _ = both_objectives(6, list(range(6)))
    one_pair, _ = both_objectives(6, [0, 1, 2, 3, 4, 0])
    assert 0 < one_pair[name](1, Group()).item() < distinct[name](1, Group()).item()


@pytest.mark.parametrize("name", ["sentence", "token"])
def test_uneven_ranks_are_refused(name: str) -> None:
    losses, _ = both_objectives(6, list(range(6)))
    with pytest.raises(ValueError, match="same number of rows"):
        losses[name](1, Group(lambda tensor: torch.cat([tensor, tensor[:1]]), 0))
    with pytest.raises(ValueError, match="rank 1 has 3 rows but the gathered batch has 3"):
        losses[name](2, Group(rank=1))  # nothing was gathered from rank 0


def test_bf16_features_are_compared_in_fp32() -> None:
    video, text = rand(4, 5, seed=3).bfloat16(), rand(4, 5, seed=4).bfloat16()
    loss = sentence_contrastive(video, text, torch.arange(4), torch.tensor(10.0))
    expected = sentence_contrastive(video.float(), text.float(), torch.arange(4), torch.tensor(10.0))
    assert loss.dtype == torch.float32 and loss.item() == expected.item()


# --- temperature


@pytest.mark.parametrize(("start", "expected"), [(0.07, 1 / 0.07), (0.001, 100.0)])
def test_scale_is_clamped_but_can_move(start: float, expected: float) -> None:
    log_scale = torch.tensor(math.log(1 / start), requires_grad=True)
    scale = clamped_scale(log_scale, 100.0)
    scale.backward()
    assert scale.item() == pytest.approx(expected, rel=1e-5)
    assert log_scale.grad is not None and log_scale.grad.item() == pytest.approx(expected, rel=1e-5)
