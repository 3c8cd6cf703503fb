"""Fixtures and rules for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import raises
from tests.jobs import World
from tests.source_tree import ROOT

# Before anything imports the library.
if raises.VARIABLE in os.environ:
    raises.watch(Path(os.environ[raises.VARIABLE]))

# Before anything imports transformers or DeepSpeed: no test may reach a network or probe for a device.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Derandomised: a failure in CI is the same failure here. Few examples: the suite's time is everybody's time.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25, database=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real corpora and small real models, never part of the repository; tests that need them skip without."""
    folder = Path(os.environ.get("SLT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (set SLT_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Generated videos and texts in shards, and a tokenizer."""
    from pipeline.demo.data import prepare
    from pipeline.demo.settings import SMOKE

    given = os.environ.get("SLT_TEST_WORLD")  # keeps the corpus between runs while working on the tests
    made = World(Path(given) if given else tmp_path_factory.mktemp("world"))
    prepare(made.root, SMOKE, seed=0, workers=1)
    return made


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Side by side run whole files, and all tests on simulated hosts as if they were one: the hosts are there once."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "hosts" if file.startswith("tests/multinode/") else file

    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped, with the reason, where they cannot run."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    reason = _why_no_gpu()
    for item in marked if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "DS_ACCELERATOR=cpu: run them with `make test-gpu`"
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device"
