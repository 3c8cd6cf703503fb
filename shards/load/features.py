"""Frozen frame features as shards: ``<key>.npy`` (float16 [T, D], one row per frame) beside the sample's ``.json``.

An index row of such a set addresses the array's data inside the ``.npy`` member, ``frames`` is T and ``width`` is D, so
order, sampling and loader are those of video, and reading a clip is one ranged read instead of a decode.
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
    stored = int(reader.plan.samples.columns["frames"][sample])
    payload = reader.payload(sample)
    if stored < 1 or len(payload) % (stored * DTYPE.itemsize):
        raise reader.error(sample, f"{len(payload)} bytes are not {stored} rows of {DTYPE.name}")
    features_TD = np.frombuffer(payload, DTYPE).reshape(stored, -1)
    wanted = wanted_frames(stored, max_frames, frame_stride)
    return features_TD if wanted is None else features_TD[wanted]
