"""The tiled contrastive losses against hand-computed values, their definitions, and the single-process big batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses.contrastive import clamped_scale, sentence_contrastive, token_contrastive
from pipeline.losses.similarity import Tokens
from pipeline.losses.tiles import cut
from tests.contrast_reference import whole_sentences, whole_sigmoid, whole_tokens
from tests.unit.pipeline.losses.meeting import Meeting, Thread, mean_over_ranks

IDS = [0, 1, 2, 0, 4, 4]
NAMES = ["sentence", "sigmoid", "token"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64).requires_grad_()


def ragged(batch: int, longest: int, seed: int) -> Tokens:
    lengths = [1 + (3 * i + seed) % longest for i in range(batch)]
    return Tokens(rand(sum(lengths), 5, seed=seed).requires_grad_(), lengths)


# --- one batch, every loss


class Batch:
    """Features of a whole batch, and the losses of a share of them."""

    def __init__(self, ids: list[int]) -> None:
        size = len(ids)
        self.ids_B = torch.tensor(ids)
        self.video_BE, self.text_BE = (rand(size, 5, seed=seed).requires_grad_() for seed in (3, 4))
        self.words, self.tokens = ragged(size, 6, 5), ragged(size, 4, 6)
        self.scale, self.token_scale, self.bias = number(7.0), number(4.0), number(-2.0)

    @property
    def leaves(self) -> dict[str, list[Tensor]]:
        sentences = [self.video_BE, self.text_BE, self.scale]
        tokens = [self.words.features_NE, self.tokens.features_NE, self.scale, self.token_scale]
        return {"sentence": sentences, "sigmoid": [*sentences, self.bias], "token": tokens}

    def share(self, name: str, rows: slice, *tiling: object) -> Tensor:
        ids_B = self.ids_B[rows]
        if name == "token":
            sides = (self._tokens(self.words, rows), self._tokens(self.tokens, rows))
            return token_contrastive(*sides, ids_B, (self.scale, self.token_scale), *tiling)  # type: ignore[arg-type]
        bias = self.bias if name == "sigmoid" else None
        sentences = (self.video_BE[rows], self.text_BE[rows])
        return sentence_contrastive(sentences, ids_B, self.scale, bias, *tiling)  # type: ignore[arg-type]

    def whole(self, name: str) -> Tensor:
        sentences = (self.video_BE, self.text_BE, self.ids_B, self.scale)
        return {
            "sentence": lambda: whole_sentences(*sentences),
            "sigmoid": lambda: whole_sigmoid(*sentences, self.bias),
            "token": lambda: whole_tokens(self.words, self.tokens, self.ids_B, (self.scale, self.token_scale)),
        }[name]()

    def _tokens(self, side: Tokens, rows: slice) -> Tokens:
        return Tokens(torch.cat(side.features_NE.split(list(side.lengths))[rows]), side.lengths[rows])


def in_ranks(batch: Batch, name: str, ranks: int, tile_numbers: int) -> Tensor:
    """Mean over ranks of their losses."""
    size = len(batch.ids_B) // ranks
    return mean_over_ranks(
        ranks, lambda rank, group: batch.share(name, slice(rank * size, (rank + 1) * size), group, tile_numbers)
    )


def assert_equal(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for grad, wanted in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tile_numbers", [1, 4, 9, 30, 1 << 20])
def test_tiles_equal_the_definition(name: str, tile_numbers: int) -> None:
    batch = Batch(IDS)
    with torch.no_grad():
        alone = batch.share(name, slice(0, 6))
    tiled = batch.share(name, slice(0, 6), *(Thread(Meeting(1), 0), tile_numbers))
    assert alone.item() == pytest.approx(tiled.item(), rel=1e-12)
    assert_equal(tiled, batch.whole(name), batch.leaves[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "tile_numbers"), [(2, 1), (2, 64), (3, 1 << 20)])
def test_ranks_equal_the_definition(name: str, ranks: int, tile_numbers: int) -> None:
    """Every rank brings other lengths of words and texts."""
    batch = Batch(IDS)
    assert_equal(in_ranks(batch, name, ranks, tile_numbers), batch.whole(name), batch.leaves[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_follows_what_comes_after_the_loss(name: str) -> None:
    batch = Batch(IDS)
    leaves = batch.leaves[name]
    assert_equal(3 * batch.share(name, slice(0, 6)) + 1, 3 * batch.whole(name) + 1, leaves)


@pytest.mark.parametrize("name", ["sentence", "token"])
def test_equal_texts_are_no_negatives(name: str) -> None:
    all_equal = Batch([7] * 6)
    loss = all_equal.share(name, slice(0, 6))
    assert loss.item() == pytest.approx(0.0, abs=1e-14)  # every row has its positive alone
    assert all(grad.abs().max() < 1e-14 for grad in torch.autograd.grad(loss, all_equal.leaves[name]))
    distinct, one_pair = Batch(list(range(6))), Batch([0, 1, 2, 3, 4, 0])
    assert 0 < one_pair.share(name, slice(0, 6)).item() < distinct.share(name, slice(0, 6)).item()


def test_an_equal_text_is_no_pair_of_the_sigmoid() -> None:
    """Neither positive nor negative: with all texts equal, only the own pairs remain."""
    batch = Batch([7] * 6)
    logits_B = batch.scale * F.cosine_similarity(batch.video_BE, batch.text_BE) + batch.bias
    torch.testing.assert_close(batch.share("sigmoid", slice(0, 6)), -F.logsigmoid(logits_B).mean(), rtol=1e-12, atol=0)


# --- values


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
    loss = sentence_contrastive((video, text), torch.tensor([0, 1]), torch.tensor(2.0))
    assert loss.item() == pytest.approx(sum(rows) / 4, rel=1e-6)


def pairwise_scores(words: Tokens, tokens: Tokens, token_scale: float) -> tuple[Tensor, Tensor]:
    """The definition, pair by pair, without masks."""
    sides = [side.features_NE.split(list(side.lengths)) for side in (words, tokens)]
    size = len(sides[0])
    video_to_text, text_to_video = torch.zeros(size, size).double(), torch.zeros(size, size).double()
    for i in range(size):
        for j in range(size):
            similarity = F.normalize(sides[0][i], dim=-1) @ F.normalize(sides[1][j], dim=-1).T
            video_to_text[i, j] = (similarity * (token_scale * similarity).softmax(1)).sum(1).mean()
            text_to_video[i, j] = (similarity * (token_scale * similarity).softmax(0)).sum(0).mean()
    return video_to_text, text_to_video


def test_token_level_against_its_definition() -> None:
    words, tokens = ragged(4, 6, 1), ragged(4, 3, 2)
    video_to_text, text_to_video = pairwise_scores(words, tokens, 5.0)
    target = torch.arange(4)
    expected = (F.cross_entropy(7 * video_to_text, target) + F.cross_entropy(7 * text_to_video.T, target)) / 2
    loss = token_contrastive(words, tokens, target, (torch.tensor(7.0), torch.tensor(5.0)))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)


def test_a_sample_without_tokens_gives_no_nan() -> None:
    words, tokens = ragged(3, 4, 1), Tokens(rand(3, 5, seed=2).requires_grad_(), [0, 2, 1])
    loss = token_contrastive(words, tokens, torch.arange(3), (number(7.0), number(5.0)))
    loss.backward()
    assert tokens.features_NE.grad is not None
    assert loss.isfinite() and tokens.features_NE.grad.isfinite().all()


def test_bf16_features_are_compared_in_fp32() -> None:
    sides = (rand(4, 5, seed=3).bfloat16(), rand(4, 5, seed=4).bfloat16())
    wide = (sides[0].float(), sides[1].float())
    loss, expected = (sentence_contrastive(both, torch.arange(4), torch.tensor(10.0)) for both in (sides, wide))
    assert loss.dtype == torch.float32 and loss.item() == expected.item()


# --- tiles


@pytest.mark.parametrize(
    ("lengths", "budget", "sizes"),
    [
        ([1] * 7, 3, [3, 3, 1]),
        ([1, 1, 2, 3, 9], 6, [3, 1, 1]),  # three of length 2, one of 3, and one that is longer than the budget
        ([2, 2], 0, [1, 1]),
        ([0, 0, 0], 1, [3]),
    ],
)
def test_cut(lengths: list[int], budget: int, sizes: list[int]) -> None:
    parts = cut(lengths, budget)
    assert [part.stop - part.start for part in parts] == sizes
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]


@pytest.mark.parametrize(
    "loss",
    [
        lambda ids_B, tiles: sentence_contrastive((rand(64, 8), rand(64, 8, seed=1)), ids_B, number(7.0), None, *tiles),
        lambda ids_B, tiles: token_contrastive(
            ragged(64, 6, 1), ragged(64, 4, 2), ids_B, (number(7.0), number(5.0)), *tiles
        ),
    ],
)
def test_no_tile_holds_more_similarities(loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by the products that make them."""
    largest, product = 0, Tensor.__matmul__

    def seen(left: Tensor, right: Tensor) -> Tensor:
        nonlocal largest
        found = product(left, right)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(Tensor, "__matmul__", seen)
    loss(torch.arange(64), (Thread(Meeting(1), 0), 400)).backward()
    assert 200 < largest <= 400


# --- temperature


@pytest.mark.parametrize(("start", "expected"), [(0.07, 1 / 0.07), (0.001, 100.0)])
def test_scale_is_clamped_but_can_move(start: float, expected: float) -> None:
    log_scale = torch.tensor(math.log(1 / start), requires_grad=True)
    scale = clamped_scale(log_scale, 100.0)
    scale.backward()
    assert scale.item() == pytest.approx(expected, rel=1e-5)
    assert log_scale.grad is not None and log_scale.grad.item() == pytest.approx(expected, rel=1e-5)
