"""The tiny corpus, and reference runs of the stages that later stages build on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.jobs import World, run_job


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Generated videos and texts in shards, a tokenizer, and exports of stages 1 and 2."""
    given = os.environ.get("SLT_TEST_WORLD")  # keeps the corpus between runs while working on the tests
    made = World(Path(given) if given else tmp_path_factory.mktemp("world"))
    if not (made.root / "reference" / "encoder" / "provenance.json").is_file():
        _make(made)
    return made


def _make(made: World) -> None:
    from pipeline.demo.data import prepare
    from pipeline.demo.settings import SMOKE
    from pipeline.export.hf import export

    prepare(made.root, SMOKE, seed=0, workers=1)
    for stage, name in (("continued_pretraining", "llm"), ("contrastive", "encoder")):
        run_dir = made.root / "runs" / stage
        run_job(stage, made.sets(stage, run_dir, 2, train__steps=3), 2)
        export(run_dir, made.root / "reference" / name)
