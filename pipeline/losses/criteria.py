"""The two losses over all pairs: softmax in both directions, and a sigmoid per pair.

Legend: B samples of this rank, R ranks, I rows and J columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses.tiles import Pairs, Positives, Scores, Tile


class Softmax:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020): the cross-entropy of every video over all texts and of every text
    over all videos; the mean over both and over this rank's samples.

    Args:
        samples: B.
    """

    def __init__(self, samples: int) -> None:
        self.part = 1 / (2 * samples)
        self.of_rows: list[Tensor] = []
        self.of_columns: list[Tensor] = []

    def begin(self, pairs: Pairs, scores: Callable[[tuple[int, int], Tile, Tile], Scores]) -> Tensor:
        """The logarithms of the softmax's sums, tile after tile."""
        for column, texts in enumerate(pairs.gathered()):
            of_column: Tensor | None = None
            for row, videos in enumerate(pairs.rows.tiles):
                found = scores((row, column), videos, texts)
                over_texts_I, over_videos_J = found[0].logsumexp(1), found[-1].logsumexp(0)
                if column == 0:
                    self.of_rows.append(over_texts_I)
                else:
                    self.of_rows[row] = torch.logaddexp(self.of_rows[row], over_texts_I)
                of_column = over_videos_J if of_column is None else torch.logaddexp(of_column, over_videos_J)
            assert of_column is not None
            self.of_columns.append(of_column)
        self._over_ranks(pairs)
        ranks, rank = pairs.group.world_size(), pairs.group.rank()
        own = [sums_J.chunk(ranks)[rank] for sums_J in self.of_columns]
        return torch.cat((*self.of_rows, *own)).sum() * self.part

    def _over_ranks(self, pairs: Pairs) -> None:
        """Every rank knows only its own videos' part of a text's sum."""
        local_N = torch.cat(self.of_columns)
        highest_N = pairs.group.all_reduce_max(local_N.clone())
        whole_N = highest_N + pairs.group.all_reduce_sum((local_N - highest_N).exp()).log()
        self.of_columns = list(whole_N.split([len(sums_J) for sums_J in self.of_columns]))

    def tile(self, at: tuple[int, int], scores: Scores, positives: Positives) -> tuple[Tensor, Scores]:
        row, column = at
        by_texts_IJ = (scores[0] - self.of_rows[row][:, None]).exp_()
        by_videos_IJ = (scores[-1] - self.of_columns[column][None, :]).exp_()
        slopes: Scores = (by_texts_IJ, by_videos_IJ) if len(scores) == 2 else (by_texts_IJ.add_(by_videos_IJ),)
        loss = scores[0].new_zeros(())
        if positives is not None:
            loss = -(scores[0][positives].sum() + scores[-1][positives].sum())
            for slope_IJ in slopes:
                slope_IJ[positives] -= 2 / len(slopes)
        return loss * self.part, tuple(slope_IJ.mul_(self.part) for slope_IJ in slopes)


class Sigmoid:
    """SigLIP (arXiv 2303.15343): every pair of a video and a text is a positive or a negative of its own; the sum over
    all texts, the mean over this rank's videos.

    An equal text of another sample is left out, as in the softmax: as a positive, a text that occurs k times would
    count k times k times.

    Args:
        samples: B.
    """

    def __init__(self, samples: int) -> None:
        self.part = 1 / samples

    def begin(self, pairs: Pairs, scores: Callable[[tuple[int, int], Tile, Tile], Scores]) -> Tensor:
        """Pairs are independent."""
        del scores
        return torch.zeros((), device=pairs.rows.tiles[0].features.device)

    def tile(self, at: tuple[int, int], scores: Scores, positives: Positives) -> tuple[Tensor, Scores]:
        del at
        (score_IJ,) = scores
        slope_IJ, loss = score_IJ.sigmoid(), F.softplus(score_IJ).sum()
        if positives is not None:
            # softplus(-s) is softplus(s) - s
            loss = loss - score_IJ[positives].sum()
            slope_IJ[positives] -= 1.0
        return loss * self.part, (slope_IJ.mul_(self.part),)
