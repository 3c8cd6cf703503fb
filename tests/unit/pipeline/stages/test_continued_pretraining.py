"""Stage 1 reads token ids, so they must be those of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.stages.continued_pretraining import check_tokenizer
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from tests.unit.pipeline.models.tiny import bpe_tokenizer
from tests.unit.shards.shard_sets import in_memory


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    plan = Plan([Source(in_memory("text", [5, 6], "other"))], PlanOptions("pack", block_tokens=8))
    with pytest.raises(RecipeError, match=r"/nowhere/other: was tokenised with another tokenizer \(fingerprint None\)"):
        check_tokenizer([plan], bpe_tokenizer(tmp_path))
