"""A loss over every pair of a video and a text of the global batch, with one tile of pairs in memory at a time.

Every rank keeps its own videos (the rows). The texts (the columns) come to it tile by tile, the same share of every
rank's at once, and go again; a similarity exists only inside its tile and is computed anew for the gradient (the idea
of Inf-CL, arXiv 2410.17243). Both directions come from one product: a rank's rows give the softmax over texts, and
the softmax over videos is put together from all ranks' columns. So memory depends on this rank's samples and on the
size of a tile, not on the global batch, and videos never travel.

Legend: B samples of this rank, R ranks, I rows and J columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """The ranks that share the global batch; `pipeline.dist` is all of them."""

    def rank(self) -> int: ...

    def world_size(self) -> int: ...

    def host_counts(self, counts: Sequence[int], /) -> list[list[int]]: ...

    def gather_rows(self, local: Tensor, /) -> Tensor: ...

    def scatter_sum(self, rows: Tensor, /) -> Tensor: ...

    def all_reduce_sum(self, value: Tensor, /) -> Tensor: ...

    def all_reduce_max(self, value: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Tile:
    """Some samples of one side."""

    features: Tensor
    """[I, E], or [I, K, E] padded with zeros."""
    facts_I2: Tensor
    """int64: identity of the sample's text, and its tokens (1 without a token axis)."""

    @property
    def text_ids_I(self) -> Tensor:
        return self.facts_I2[:, 0]

    @property
    def lengths_I(self) -> Tensor:
        return self.facts_I2[:, 1]


Scores = tuple[Tensor, ...]
"""[I, J] each: how well every row finds every column, and how well every column finds every row. Only one tensor if
both are equal."""
Similarity = Callable[[Tile, Tile, Tensor], Scores]
"""``similarity(rows, columns, token_scale)``, differentiable in all three."""


def cut(lengths: Sequence[int], budget: int) -> list[slice]:
    """Neighbours whose number times their longest length stays within ``budget``; at least one each."""
    slices, start, longest = [], 0, 0
    for at, length in enumerate(lengths):
        longest = max(longest, length)
        if at > start and (at + 1 - start) * longest > budget:
            slices.append(slice(start, at))
            start, longest = at, length
    return [*slices, slice(start, len(lengths))]


@dataclass(frozen=True, slots=True)
class Side:
    """This rank's samples in tiles."""

    tiles: list[Tile]
    order: Sequence[int]
    """Which sample stands where, over all tiles."""

    def places(self) -> list[tuple[int, int]]:
        """Of every sample, its tile and its place there."""
        stands = [(at, place) for at, tile in enumerate(self.tiles) for place in range(len(tile.facts_I2))]
        return [stand for _, stand in sorted(zip(self.order, stands, strict=True))]


@dataclass(frozen=True, slots=True)
class Pairs:
    """All pairs of this rank's rows and every rank's columns."""

    rows: Side
    columns: Side
    """Of this rank; all ranks have equally many tiles, of equal shapes."""
    similarity: Similarity
    group: Group

    def gathered(self) -> Iterator[Tile]:
        """The tiles of columns, each of all ranks, in the order of the ranks. All ranks must go through all of them."""
        for tile in self.columns.tiles:
            yield Tile(self.group.gather_rows(tile.features), self.group.gather_rows(tile.facts_I2))

    def positives(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Tile (row, column) -> where in it videos meet their own texts: [positives] each. Other tiles have none."""
        of_tile: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for (row, i), (column, j) in zip(self.rows.places(), self.columns.places(), strict=True):
            first = self.group.rank() * len(self.columns.tiles[column].facts_I2)
            of_tile.setdefault((row, column), []).append((i, first + j))
        table_2B = torch.tensor([pair for pairs in of_tile.values() for pair in pairs]).T
        table_2B = table_2B.to(self.rows.tiles[0].facts_I2.device, non_blocking=True)
        parts = table_2B.split([len(pairs) for pairs in of_tile.values()], dim=1)
        return {at: (part[0], part[1]) for at, part in zip(of_tile, parts, strict=True)}


Positives = tuple[Tensor, Tensor] | None


class Criterion(Protocol):
    """What a loss makes of scores, which it may overwrite. Pairs of different samples with an equal text have the
    lowest number of their type: they are neither positives nor negatives."""

    def begin(self, pairs: Pairs, scores: Callable[[tuple[int, int], Tile, Tile], Scores]) -> Tensor:
        """Goes through all pairs if it must know all of them first; returns the loss that belongs to no tile."""

    def tile(self, at: tuple[int, int], scores: Scores, positives: Positives) -> tuple[Tensor, Scores]:
        """The loss of the tile at (row, column), a scalar, and its derivatives by the scores."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The learned numbers of a loss; [] or [1] each. A score is ``scale * similarity + bias``."""

    scale: Tensor
    """Positive."""
    token_scale: Tensor
    """Handed to the similarity."""
    bias: Tensor | None = None


def tiled_loss(pairs: Pairs, criterion: Criterion, numbers: Numbers) -> Tensor:
    """This rank's part of a loss, a scalar. All ranks must call.

    Gradients are computed with the loss, and backward only multiplies them. They are those of the sum of all ranks'
    parts by this rank's features, so that averaging gradients over ranks gives the gradient of the mean of all parts.
    """
    features = [tile.features for side in (pairs.rows, pairs.columns) for tile in side.tiles]
    learned = (numbers.scale, numbers.token_scale, numbers.bias)
    loss: Tensor = _TiledLoss.apply(pairs, criterion, *learned, *features)
    return loss


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Pairs, criterion: Criterion, *tensors: Any) -> Tensor:
        work = _Work(pairs, Numbers(*tensors[:3]), any(ctx.needs_input_grad))
        total = criterion.begin(pairs, work.scores)
        for column, tile in enumerate(pairs.gathered()):
            total = total + work.visit(column, tile, criterion)
        ctx.save_for_backward(*work.of_learned, *work.of_rows, *work.of_columns)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *(None if gradient is None else grads[0] * gradient for gradient in ctx.saved_tensors)


class _Work:
    """Adds up the gradients of the learned numbers, the rows and the columns, tile by tile."""

    def __init__(self, pairs: Pairs, numbers: Numbers, differentiate: bool) -> None:
        self.pairs, self.numbers, self.differentiate = pairs, numbers, differentiate
        self.positives = pairs.positives()
        self.of_learned = [
            None if number is None else torch.zeros_like(number)
            for number in (numbers.scale, numbers.token_scale, numbers.bias)
        ]
        self.of_rows = [torch.zeros_like(tile.features) for tile in pairs.rows.tiles] if differentiate else []
        self.of_columns: list[Tensor] = []

    def scores(self, at: tuple[int, int], rows: Tile, columns: Tile) -> Scores:
        """Of the tile at (row, column)."""
        return self._scored(at, self.pairs.similarity(rows, columns, self.numbers.token_scale), rows, columns)

    def visit(self, column: int, columns: Tile, criterion: Criterion) -> Tensor:
        """The loss of all rows with these columns of all ranks."""
        leaf, loss = self._leaf(columns), torch.zeros((), device=columns.features.device)
        of_columns = torch.zeros_like(columns.features) if self.differentiate else None
        for row, rows in enumerate(self.pairs.rows.tiles):
            part, of_row, of_column = self._tile((row, column), self._leaf(rows), leaf, criterion)
            loss = loss + part
            if of_columns is not None:
                self.of_rows[row] += of_row
                of_columns += of_column
        if of_columns is not None:
            self.of_columns.append(self.pairs.group.scatter_sum(of_columns))
        return loss

    def _leaf(self, tile: Tile) -> Tile:
        return replace(tile, features=tile.features.detach().requires_grad_(self.differentiate))

    def _scored(self, at: tuple[int, int], similarities: Scores, rows: Tile, columns: Tile) -> Scores:
        """Similarities become scores in place."""
        blocked_IJ = rows.text_ids_I[:, None] == columns.text_ids_I[None, :]
        if (positives := self.positives.get(at)) is not None:
            blocked_IJ[positives] = False
        for similarity_IJ in similarities:
            similarity_IJ.mul_(self.numbers.scale)
            if self.numbers.bias is not None:
                similarity_IJ.add_(self.numbers.bias)
            similarity_IJ.masked_fill_(blocked_IJ, torch.finfo(similarity_IJ.dtype).min)
        return similarities

    def _tile(
        self, at: tuple[int, int], rows: Tile, columns: Tile, criterion: Criterion
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of one tile, and its gradients by the features of both sides (without gradients: no meaning)."""
        token_scale = self.numbers.token_scale.detach().requires_grad_(self.differentiate)
        with torch.set_grad_enabled(self.differentiate):
            similarities = self.pairs.similarity(rows, columns, token_scale)
        # what makes similarities (products) needs their inputs for its gradient, not them
        scores = self._scored(at, tuple(similarity.detach() for similarity in similarities), rows, columns)
        loss, slopes = criterion.tile(at, scores, self.positives.get(at))
        if not self.differentiate:
            return loss, rows.features, columns.features
        self._add_learned(scores, slopes)
        outward = [slope_IJ.mul_(self.numbers.scale) for slope_IJ in slopes]
        leaves = (rows.features, columns.features, token_scale)
        of_rows, of_columns, of_token_scale = torch.autograd.grad(similarities, leaves, outward, allow_unused=True)
        if of_token_scale is not None:  # sentences have none
            self._add(1, of_token_scale)
        return loss, of_rows, of_columns

    def _add_learned(self, scores: Scores, slopes: Scores) -> None:
        """Of scale and bias; a score is ``scale * similarity + bias``."""
        scale, bias = self.numbers.scale, self.numbers.bias
        for score_IJ, slope_IJ in zip(scores, slopes, strict=True):
            if bias is None:
                self._add(0, torch.dot(slope_IJ.flatten(), score_IJ.flatten()) / scale)
            else:
                whole = slope_IJ.sum()
                self._add(0, (torch.dot(slope_IJ.flatten(), score_IJ.flatten()) - bias * whole) / scale)
                self._add(2, whole)

    def _add(self, number: int, gradient: Tensor) -> None:
        sums = self.of_learned[number]
        assert sums is not None
        sums += gradient
