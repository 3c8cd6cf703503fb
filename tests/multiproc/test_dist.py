"""The collectives between two real gloo ranks, and what the ranks of a run agree on with them."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import dist
from pipeline.config.recipe_file import RecipeFile
from pipeline.engine import recipe
from pipeline.engine.recipe import Unresolved, file_of_run, read_on_all_ranks
from pipeline.errors import ClusterError, RecipeError, SltError
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc


def _agreed(rank: int, folder: Path) -> dict[str, Any]:
    """The recipe of a run, started without our launcher; then rank 1 reads another file, then a recipe is wrong."""
    ranks = dist.Ranks(rank, rank, 2)
    given = Unresolved("demo_connector", (f"run_dir={folder}", "train.global_batch=8", "train.micro_batch=2"))
    recipe.check_inputs = lambda loaded: None  # type: ignore[attr-defined]
    with file_of_run(given, nullcontext) as file:
        found: dict[str, Any] = {"file": file, "resolved": read_on_all_ranks(file, ranks)}
    copy = RecipeFile(folder / str(rank) / file.path.name, file.sha256)
    copy.run_dir.mkdir()
    copy.path.write_bytes(file.path.read_bytes() + b"\n" * rank)
    for name, attempt in {
        "other": lambda: read_on_all_ranks(copy, ranks),
        "wrong": file_of_run(Unresolved("demo_connector", ("train.global_batch=3",)), nullcontext).__enter__,
    }.items():
        try:
            attempt()
        except SltError as error:
            found[name] = error
    return found


def _everything(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Run once in each rank: starting ranks is what takes the time."""
    local = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) + 10 * rank
    # every rank weighs the rows of both differently
    weights = torch.arange(8, dtype=torch.float64).view(4, 2) * (1 + 2 * rank)
    transposed = torch.arange(6).view(2, 3).T + 100 * rank  # not contiguous
    assert not transposed.is_contiguous()
    rows = dist.gather_rows(transposed)
    dist.barrier()
    return _agreed(rank, folder) | {
        "place": (dist.rank(), dist.world_size(), dist.is_main()),
        "gathered": dist.gather_rows(local),
        "scattered": [dist.scatter_sum(weights.to(dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)],
        "rows": rows,
        "mask": dist.gather_rows(torch.tensor([rank == 0, True]).to(torch.uint8)).bool(),
        "sum": dist.all_reduce_sum(torch.tensor([rank + 1, 10])),
        "max": dist.all_reduce_max(torch.tensor([-rank, rank])),
        "from_main": dist.broadcast_object({"rank": rank}),
        "from_last": dist.broadcast_object({"rank": rank}, source=1),
        "numbers": dist.host_numbers([rank + 0.5, 0.1]),
        "counts": dist.host_counts([rank, 7]),
        "objects": dist.gather_objects(["rank", rank]),
        "any": [dist.any_rank(rank == 1), dist.any_rank(False)],
    }


def test_two_ranks(tmp_path: Path) -> None:
    results = run_ranks(_everything, 2, tmp_path)
    ramp = torch.arange(8, dtype=torch.float64).view(4, 2)
    for rank, found in enumerate(results):
        assert found["place"] == (rank, 2, rank == 0)
        assert found["gathered"].tolist() == [[1, 2], [3, 4], [11, 12], [13, 14]]
        # weights 1 and 3 times the ramp, my half of it
        assert all(torch.equal(part.double(), 4 * ramp[2 * rank : 2 * rank + 2]) for part in found["scattered"])
        assert found["rows"].tolist() == [[0, 3], [1, 4], [2, 5], [100, 103], [101, 104], [102, 105]]
        assert found["mask"].tolist() == [True, True, False, True]
        assert found["sum"].tolist() == [3, 20] and found["max"].tolist() == [0, 1]
        assert found["from_main"] == {"rank": 0} and found["from_last"] == {"rank": 1}
        assert found["counts"] == [[0, 7], [1, 7]]
        assert found["numbers"] == [[0.5, 0.1], [1.5, 0.1]]
        assert found["objects"] == [["rank", 0], ["rank", 1]]
        assert found["any"] == [True, False]
        assert found["file"].path == tmp_path / "recipe.resolved.yaml"
        assert found["resolved"].to_yaml() == found["file"].path.read_text() and found["resolved"].world_size == 2
        assert isinstance(found["other"], ClusterError)
        assert re.search(r"but\n  rank 1 on \S+: reads sha256 [0-9a-f]{64}\nrun_dir must be", str(found["other"]))
        assert isinstance(found["wrong"], RecipeError)
        assert "is not a multiple of train.micro_batch" in str(found["wrong"])
