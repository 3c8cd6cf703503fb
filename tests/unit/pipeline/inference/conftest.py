from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.pipeline.exported import save_export, save_shards


@pytest.fixture(scope="session")
def export_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def shard_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shards(tmp_path_factory.mktemp("data"))
