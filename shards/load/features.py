"""Frozen frame features as shards: ``<key>.npy`` (float16 [T, D], one row per frame) beside the sample's ``.json``.

An index row of such a set addresses the array's data inside the ``.npy`` member, ``frames`` is T and ``width`` is D, so
order, sampling and loader are those of video, and reading a clip is one ranged read instead of a decode. Where clips
have several views (the first of the clip as it is, the others of augmented ones), the array is [K, T, D] and
``height`` is K; the views of a clip are read and checked together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.load.reader import SampleReader, wanted_frames

DTYPE = np.dtype("<f2")


def read_features(reader: SampleReader, sample: int, max_frames: int = 0, frame_stride: int = 1) -> NDArray[np.float16]:
    """Features [T, D] of a clip, of the same frames that ``SampleReader.frames`` would decode.

    Args:
        reader: over a plan of feature shards.
        sample: number in the plan.
        max_frames: keep at most so many, evenly spread over the clip; 0 = no limit.
        frame_stride: keep every n-th stored frame, before the limit.

    Raises:
        DataError: the bytes are damaged, or do not hold as many frames as the index says.
    """
    features_TD = read_views(reader, sample)[0]
    wanted = wanted_frames(len(features_TD), max_frames, frame_stride)
    return features_TD if wanted is None else features_TD[wanted]


def read_views(reader: SampleReader, sample: int) -> NDArray[np.float16]:
    """All views [K, T, D] of a clip's features; the first one is of the clip as it is.

    Raises DataError as ``read_features``.
    """
    stored, width = reader.stored_frames(sample), reader.row(sample).width
    payload = reader.payload(sample)
    if stored < 1 or width < 1 or len(payload) % (stored * width * DTYPE.itemsize):
        raise reader.error(sample, f"{len(payload)} bytes are not {stored} rows of {DTYPE.name}")
    return np.frombuffer(payload, DTYPE).reshape(-1, stored, width)
