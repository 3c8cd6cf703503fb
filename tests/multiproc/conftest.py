"""Reference runs of the stages that later stages build on."""

from __future__ import annotations

import pytest

from tests.jobs import World, run_job


@pytest.fixture(scope="session")
def world(corpus: World) -> World:
    """The tiny corpus with exports of stages 1 and 2."""
    if not (corpus.root / "reference" / "encoder" / "provenance.json").is_file():
        _make(corpus)
    return corpus


def _make(made: World) -> None:
    from pipeline.export.hf import export

    for stage, name in (("continued_pretraining", "llm"), ("contrastive", "encoder")):
        run_dir = made.root / "runs" / stage
        run_job(stage, made.sets(stage, run_dir, 2, train__steps=3), 2)
        export(run_dir, made.root / "reference" / name)
