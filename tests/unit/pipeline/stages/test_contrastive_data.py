from __future__ import annotations

import pytest

from pipeline.errors import RecipeError
from pipeline.stages.contrastive import check_texts
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from tests.unit.shards.shard_sets import in_memory


def test_a_batch_of_more_clips_than_distinct_texts() -> None:
    videos = in_memory("video", [5] * 6, text_hash=[1, 2, 3, 3, 3, 4])

    def plan(batch: int) -> Plan:
        options = PlanOptions(seed=0, kind="clip", unique_texts_window=batch, max_frames=8)
        return Plan([Source(videos, "train")], options)

    check_texts(plan(0))
    check_texts(plan(4))
    with pytest.raises(RecipeError, match=r"train\.global_batch=5 is more than the 4 distinct texts of data\.train"):
        check_texts(plan(5))
