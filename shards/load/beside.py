"""Rows of the same samples in a second shard set: keypoints beside videos or features, found by corpus and id."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.load.features import read_features
from shards.load.reader import Reader
from shards.order.plan import Plan
from shards.schema import IndexRow
from shards.storage.access import Remote

SLACK = 1
"""Frames by which a clip and its keypoints may differ."""
_FIX = "build both sets from the same corpus at the same frame rate"


class Beside:
    """Reads the rows that belong to a sample of another plan. Picklable, for loader processes.

    Args:
        plan: of the second sets, all their samples that are needed.
        remote: how the shards of remote sets are read.

    Raises:
        DataError: two samples have the same corpus and id.
    """

    def __init__(self, plan: Plan, remote: Remote | None = None) -> None:
        self.reader = Reader(plan, remote=remote)
        keys = _keys(plan)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        if (same := np.flatnonzero(self._keys[1:] == self._keys[:-1])).size:
            raise DataError(
                "two samples have the same corpus and id",
                where=self.reader.where(int(self._order[int(same[0])])),
                fix="name every set of keypoints once",
            )

    def check(self, plan: Plan) -> None:
        """Refuse a plan with samples that have no rows here, or another number of them. Reads indices only.

        Raises:
            DataError: names the first such sample.
        """
        keys = _keys(plan)
        found = self._places(keys)
        missing = self._keys[found] != keys
        (mine,) = self.reader.plan.samples.numbers(("frames",), self._order[found])
        (theirs,) = plan.samples.numbers(("frames",), np.arange(len(keys)))
        if (wrong := np.flatnonzero(missing | (abs(mine - theirs) > SLACK))).size:
            sample = int(wrong[0])
            what = f"{mine[sample]} frames of keypoints for its {theirs[sample]} frames"
            what = "no keypoints" if missing[sample] else what
            row = plan.samples.row(sample)
            more = f"; so have {wrong.size - 1} more samples" if wrong.size > 1 else ""
            raise DataError(
                f"has {what} in {self.reader.plan.sources[0].shard_set.dir}{more}",
                where=f"{plan.samples.shard_path(sample)}:{row.key} ({row.corpus}/{row.sample_id})",
                fix=_FIX,
            )

    def rows(self, row: IndexRow) -> NDArray[np.float16]:
        """Rows [T, W] of a sample of the other plan, one for each of its frames.

        Raises:
            DataError: the bytes are damaged, there is no such sample here, or it has another number of frames.
        """
        place = int(self._places(np.asarray([_key(row.corpus, row.sample_id)]))[0])
        sample = int(self._order[place])
        found = self._keys[place] == _key(row.corpus, row.sample_id)
        where = f"{row.corpus}/{row.sample_id}"
        if not found:
            raise DataError("has no keypoints beside it", where=where, fix=_FIX)
        return fitted(read_features(self.reader, sample), row.frames, where)

    def _places(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each key stands or would stand, never behind the last."""
        return np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)


def fitted(rows_TW: NDArray[np.float16], frames: int, where: str) -> NDArray[np.float16]:
    """One row per frame: where a video and its keypoints differ by one frame, which rounding at a cut makes, the last
    row is left out or repeated.

    Raises:
        DataError: they differ by more.
    """
    if abs(len(rows_TW) - frames) > SLACK:
        raise DataError(f"has {len(rows_TW)} frames of keypoints beside its {frames} frames", where=where, fix=_FIX)
    return rows_TW if len(rows_TW) == frames else rows_TW[np.minimum(np.arange(frames), len(rows_TW) - 1)]


def _keys(plan: Plan) -> NDArray[np.int64]:
    corpora, ids = (plan.samples.column(name).to_pylist() for name in ("corpus", "sample_id"))
    return np.asarray([_key(corpus, sample) for corpus, sample in zip(corpora, ids, strict=True)], dtype=np.int64)


def _key(corpus: str, sample_id: str) -> int:
    """63 bits of a hash."""
    digest = hashlib.blake2b(f"{corpus}\0{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
