"""Where the frames of a batch of clips stand: all that the visual encoder has to know of lengths.

Frames of all clips are packed, one clip after another, without padding. Windows, groups to merge and whole samples are
contiguous spans of these rows. Loader workers make the layout beside the batch, so that no step on a device has to wait
for a number.

Legend: B samples, N packed frames, M packed word tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.models.attention.spans import Spans


class ClipSizes(NamedTuple):
    """What an encoder's config says about layouts (`VisualEncoderConfig.clip_sizes`)."""

    window_frames: int
    """Rows of an attention window, at frame and at word rate."""
    stride: int
    """Frames merged into one word token."""
    max_frames: int
    """Longest clip."""
    clip_frames: int = 0
    """Frames that a video model reads at once; 0 where frames are read one by one."""
    clip_stride: int = 0
    """Frames from the beginning of one of its windows to that of the next."""


class ClipLayout(NamedTuple):
    """Layout of a batch for an encoder of these sizes. Windows begin at every clip's own first frame."""

    sizes: ClipSizes
    frame_lengths_B: Tensor
    """int64: frames of every sample."""
    word_lengths_B: Tensor
    """int64: word tokens of every sample, ceil(frames / stride)."""
    frame_samples_N: Tensor
    """int64: number of a frame's sample."""
    word_samples_M: Tensor
    frame_positions_N: Tensor
    """int64: number of a frame inside its sample."""
    word_positions_M: Tensor
    merge_slots_N: Tensor
    """int64: slot (word * stride + frame in word) of a frame in [M * stride]; the last word of a clip may have empty
    ones."""
    merge_counts_M: Tensor
    """int64: frames of a word."""
    windows: Spans
    """Windows of frames."""
    shifted_windows: Spans
    """The same with borders moved by half a window."""
    word_windows: Spans
    samples: Spans
    """Word tokens of whole samples."""
    queries: Spans
    """One row per sample, in the order of `samples`: the queries of attention pooling."""
    longest_frames: int
    """Frames of the longest clip. The longest in words is ``samples.longest``."""
    clip_frames_GF: Tensor | None = None
    """int64: packed frame at every place of every window of a video model; None for other encoders."""
    clip_slots_N: Tensor | None = None
    """int64: place (window * F + place in it) of every frame, in the window whose middle is nearest."""

    @classmethod
    def of(cls, frame_lengths: Sequence[int], sizes: ClipSizes) -> ClipLayout:
        """Layout of clips of these lengths, on the CPU.

        Raises:
            DataError: no clips, an empty clip, or one longer than ``max_frames``.
        """
        _check(frame_lengths, sizes.max_frames)
        frames_B = np.asarray(frame_lengths, dtype=np.int64)
        words_B = -(-frames_B // sizes.stride)
        frame_samples_N, frame_positions_N = _enumerate(frames_B)
        word_samples_M, word_positions_M = _enumerate(words_B)
        first_word_B = words_B.cumsum() - words_B
        clip_windows = _clip_windows(frames_B, sizes) if sizes.clip_frames else (None, None)
        counts_M = np.minimum(sizes.stride, frames_B[word_samples_M] - word_positions_M * sizes.stride)
        return cls(
            sizes=sizes,
            frame_lengths_B=torch.from_numpy(frames_B),
            word_lengths_B=torch.from_numpy(words_B),
            frame_samples_N=torch.from_numpy(frame_samples_N),
            word_samples_M=torch.from_numpy(word_samples_M),
            frame_positions_N=torch.from_numpy(frame_positions_N),
            word_positions_M=torch.from_numpy(word_positions_M),
            merge_slots_N=torch.from_numpy(first_word_B[frame_samples_N] * sizes.stride + frame_positions_N),
            merge_counts_M=torch.from_numpy(counts_M),
            windows=Spans.of(window_lengths(frames_B, sizes.window_frames)),
            shifted_windows=Spans.of(window_lengths(frames_B, sizes.window_frames, sizes.window_frames // 2)),
            word_windows=Spans.of(window_lengths(words_B, sizes.window_frames)),
            samples=Spans.of(words_B),
            queries=Spans.of(np.ones_like(words_B), beside=words_B),
            longest_frames=int(frames_B.max()),
            clip_frames_GF=clip_windows[0],
            clip_slots_N=clip_windows[1],
        )

    def to(self, device: torch.device | str) -> ClipLayout:
        """The same with its tensors on a device."""
        moved: list[Any] = [
            part.to(device, non_blocking=True) if isinstance(part, Tensor | Spans) else part for part in self
        ]
        return ClipLayout(*moved)

    def pad_frames(self, rows_ND: Tensor) -> Tensor:
        """Packed frames -> [B, longest, D] with zeros behind every sample's last."""
        return _padded(rows_ND, self.frame_samples_N, self.frame_positions_N, self._shape(self.longest_frames))

    def pad_words(self, rows_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Packed word tokens -> [B, longest, D] with zeros behind every sample's last, and where real ones are."""
        longest = self.samples.longest
        places = torch.arange(longest, device=self.word_lengths_B.device)
        padded = _padded(rows_MD, self.word_samples_M, self.word_positions_M, self._shape(longest))
        return padded, places < self.word_lengths_B[:, None]

    def _shape(self, longest: int) -> tuple[int, int]:
        return len(self.frame_lengths_B), longest


def _clip_windows(frames_B: np.ndarray, sizes: ClipSizes) -> tuple[Tensor, Tensor]:
    """`ClipLayout.clip_frames_GF` and ``clip_slots_N``: windows begin every ``clip_stride`` frames until one reaches
    the clip's end; places behind it repeat the clip's last frame."""
    size, stride = sizes.clip_frames, sizes.clip_stride
    windows_B = np.maximum(0, -(-(frames_B - size) // stride)) + 1
    sample_G, number_G = _enumerate(windows_B)
    places_GF = number_G[:, None] * stride + np.arange(size)
    first_B = frames_B.cumsum() - frames_B
    frames_GF = first_B[sample_G, None] + np.minimum(places_GF, frames_B[sample_G, None] - 1)
    sample_N, position_N = _enumerate(frames_B)
    nearest_N = np.rint((position_N - (size - 1) / 2) / stride).astype(np.int64)
    window_N = nearest_N.clip(0, windows_B[sample_N] - 1)
    first_window_B = windows_B.cumsum() - windows_B
    slots_N = (first_window_B[sample_N] + window_N) * size + position_N - window_N * stride
    return torch.from_numpy(frames_GF), torch.from_numpy(slots_N)


def window_lengths(length_B: np.ndarray, size: int, shift: int = 0) -> np.ndarray:
    """Rows of every window when samples are cut at ``shift`` modulo ``size`` from their own first row, int64 [G]."""
    pad = (size - shift) % size
    windows_B = (length_B - 1 + pad) // size + 1
    last_G = windows_B.cumsum() - 1
    lengths_G = np.full(int(windows_B.sum()), size, dtype=np.int64)
    lengths_G[last_G - windows_B + 1] -= pad
    lengths_G[last_G] -= windows_B * size - pad - length_B
    return lengths_G


def _enumerate(length_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sample and number inside the sample of every row."""
    sample_N = np.repeat(np.arange(len(length_B)), length_B)
    return sample_N, np.arange(len(sample_N)) - (length_B.cumsum() - length_B)[sample_N]


def _padded(rows_ND: Tensor, sample_N: Tensor, position_N: Tensor, shape: tuple[int, int]) -> Tensor:
    samples, longest = shape
    flat = rows_ND.new_zeros(samples * longest, *rows_ND.shape[1:])
    return flat.index_copy(0, sample_N * longest + position_N, rows_ND).unflatten(0, shape)


def _check(lengths: Sequence[int], max_frames: int) -> None:
    if min(lengths, default=0) < 1:
        raise DataError(
            f"frame lengths {list(lengths)} hold an empty clip, or no clip",
            where="batch of clips",
            fix="pass every sample's frame count, at least 1 each",
        )
    if (longest := max(lengths)) > max_frames:
        raise DataError(
            f"a clip of {longest} frames exceeds max_frames {max_frames}",
            where=f"sample {list(lengths).index(longest)} of the batch",
            fix="lower data.max_frames or raise data.frame_stride",
        )
