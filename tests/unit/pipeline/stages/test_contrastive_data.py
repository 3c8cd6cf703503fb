from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.errors import RecipeError
from pipeline.stages.contrastive import Contrastive
from shards.order.plan import Plan, PlanOptions, Source
from tests.unit.shards.shard_sets import in_memory


def test_a_batch_of_more_clips_than_distinct_texts() -> None:
    stage = Contrastive.__new__(Contrastive)
    stage.module = SimpleNamespace(visual=None)
    videos = in_memory("video", [5] * 6, text_hash=[1, 2, 3, 3, 3, 4])

    def plan(batch: int) -> Plan:
        options = PlanOptions(seed=0, kind="clip", unique_texts_window=batch, max_frames=8)
        return Plan([Source(videos, "train")], options)

    stage.check_data(plan(0))
    stage.check_data(plan(4))
    with pytest.raises(RecipeError, match=r"train\.global_batch=5 is more than the 4 distinct texts of data\.train"):
        stage.check_data(plan(5))
