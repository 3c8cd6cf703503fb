"""A run that ends because nothing improves: on all ranks at the same step, with exit code 0, also after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.jobs import World, rows, run_job
from tests.multiproc.test_training import newest, weights

pytestmark = pytest.mark.multiproc

STAGE = "continued_pretraining"
SETTINGS = {
    "train__steps": 9, "train__eval_every_steps": 1, "train__checkpoint__every_steps": 1, "train__checkpoint__keep": 9,
}  # fmt: skip


def test_two_ranks_end_together_and_a_resumed_run_ends_at_the_same_step(corpus: World, tmp_path: Path) -> None:
    stop = {"train__early_stop": "{patience: 3, min_delta: 50}"}
    sets = {name: corpus.sets(STAGE, tmp_path / name, 2, **SETTINGS, **stop) for name in ("whole", "resumed")}
    said = "ended early at step 3 of 9: eval/loss has not improved by more than 50 in 3 evaluations since step 0"
    output = run_job(STAGE, sets["whole"], 2)
    assert said in output and "; the best checkpoint is step-000003" in output
    assert max(rows(tmp_path / "whole")) == newest(tmp_path / "whole").step == 3
    assert newest(tmp_path / "whole").probe(), "the last checkpoint can be exported"
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-00000{step}")
    assert said in run_job(STAGE, sets["resumed"], 2)
    assert newest(tmp_path / "resumed").state() == newest(tmp_path / "whole").state()
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")
    assert said in run_job(STAGE, sets["whole"], 2), "started again, it trains nothing"
    assert max(rows(tmp_path / "whole")) == 3
    more = corpus.sets(STAGE, tmp_path / "whole", 2, **SETTINGS, train__early_stop="{patience: 4, min_delta: 50}")
    assert "ended early at step 4 of 9" in run_job(STAGE, more, 2)
