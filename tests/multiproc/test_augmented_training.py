"""Runs that augment clips and draw texts: the same losses at any world size, and to the last bit after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shards.format.index import read_index
from shards.format.text_columns import write_column
from tests.jobs import World, rows, run_job
from tests.multiproc.test_training import SETTINGS, TO_ROUNDING, newest, weights

pytestmark = pytest.mark.multiproc

AUGMENT = (
    "{crop_area: [0.5, 1.0], scale: [0.9, 1.1], shift: 0.1, flip: 0.5, brightness: 0.2, saturation: 0.3, erase: 0.3,"
    " speed: [0.7, 1.5], drop_frames: 0.1, keep_part: [0.7, 1.0]}"
)


def test_augmented_runs_train_alike_at_any_world_size_and_resume_bit_equal(world: World, tmp_path: Path) -> None:
    """The connector stage with `pack_tokens`: augmented clips of any length, and one of three texts of each."""
    video = Path(shutil.copytree(world.video, tmp_path / "video"))
    shard_set = read_index(video)
    write_column(shard_set, "paraphrase", [[f"{n} said", f"{n} again"][: n % 3] for n in range(len(shard_set))], {})
    settings = {
        **SETTINGS, "data__pack_tokens": 150, "data__augment": AUGMENT, "data__references__train": "[paraphrase]",
        "train__global_batch": 4, "train__micro_batch": 1,
    }  # fmt: skip

    def run(name: str, ranks: int, **changes: object) -> str:
        sets = world.sets("connector", tmp_path / name, ranks, **{**settings, **changes})
        return run_job("connector", [*sets, f"data.train=[{{shards: {video}}}]"], ranks)

    run("two", 2)
    run("one", 1, train__micro_batch=4, data__workers=2)
    assert rows(tmp_path / "one") == pytest.approx(rows(tmp_path / "two"), rel=TO_ROUNDING)
    assert newest(tmp_path / "one").state().data == newest(tmp_path / "two").state().data
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000006")
    assert "step-000003 at step 3" in run("resumed", 2)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "two")
    assert weights(tmp_path / "resumed") == weights(tmp_path / "two")
