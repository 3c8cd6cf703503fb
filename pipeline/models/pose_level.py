"""Pose level of the visual encoder: the keypoints of a frame -> one vector.

Every group of joints (body, left hand, right hand, face) is seen on its own: where it is, how large it is, and its
shape without both, which is what a handshape is. Uni-Sign (arXiv 2501.15187) also encodes the groups apart and hands
relative to themselves; it convolves over a skeleton graph, which needs no layout of ours, so here an MLP per group
does the mixing.

Legend: N packed frames, J joints of a group, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHANNELS = 3
"""Numbers per joint: x, y, confidence (`shards.media.poses`)."""
SMALLEST = 1e-3
"""Sizes of a group below this many shoulder widths are no shape but noise."""


def group_inputs(rows_NJ3: Tensor) -> Tensor:
    """What a group's network reads, [N, 3 J + 3]: its shape, the confidences, its middle and its size.

    Joints with confidence 0 were not found: they are 0 in every number and count neither for the middle nor for the
    size. A group of which nothing was found is 0 altogether.
    """
    xy_NJ2, confidence_NJ = rows_NJ3[..., :2], rows_NJ3[..., 2]
    found_NJ1 = (confidence_NJ > 0).to(rows_NJ3.dtype)[..., None]
    count_N1 = found_NJ1.sum(1).clamp(min=1)
    middle_N2 = (xy_NJ2 * found_NJ1).sum(1) / count_N1
    local_NJ2 = (xy_NJ2 - middle_N2[:, None]) * found_NJ1
    size_N1 = (local_NJ2.square().sum((1, 2)) / count_N1[:, 0]).sqrt()[:, None]
    shape_NJ2 = local_NJ2 / size_N1.clamp(min=SMALLEST)[:, None]
    return torch.cat((shape_NJ2.flatten(1), confidence_NJ, middle_N2, size_N1), dim=1)


class PoseLevel(nn.Module):
    """Keypoints [N, 3 * joints] -> [N, groups * width].

    Args:
        sizes: joints of every group, in the order in which they are stored.
        width: of one group.
    """

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.groups = nn.ModuleList(
            nn.Sequential(nn.Linear(CHANNELS * joints + 3, width), nn.GELU(), nn.Linear(width, width))
            for joints in sizes
        )

    def forward(self, rows_NK: Tensor) -> Tensor:
        """``rows_NK``: floats; the geometry is computed in float32 whatever the weights are."""
        wide = rows_NK if rows_NK.dtype == torch.float64 else rows_NK.float()
        parts = wide.unflatten(1, (-1, CHANNELS)).split(self.sizes, dim=1)
        dtype = next(self.parameters()).dtype
        return torch.cat([net(group_inputs(part).to(dtype)) for net, part in zip(self.groups, parts, strict=True)], 1)


__all__ = ["CHANNELS", "PoseLevel", "group_inputs"]
