from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.recipe_file import recipe_file, write_resolved
from pipeline.config.resolve import ResolvedRecipe, resolve
from pipeline.errors import StorageError
from tests.unit.pipeline.config.recipes import PRETRAINING, write


def test_write_resolved(tmp_path: Path) -> None:
    resolved = resolve(load_recipe(write(tmp_path, PRETRAINING)), 2)
    file = write_resolved(resolved, tmp_path / "run")
    assert write_resolved(resolved, tmp_path / "run") == file == recipe_file(resolved, tmp_path / "run")
    content = file.path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == file.sha256 and ResolvedRecipe.from_yaml(content.decode()) == resolved
    assert json.loads((file.run_dir / "ds_config.resolved.json").read_text()) == resolved.ds_config
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "ds_config.resolved.json",
        "recipe.resolved.yaml",
    ]
    assert file.path.stat().st_mode & 0o777 == 0o644


def test_another_world_size_is_another_file(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PRETRAINING))
    one, two = (write_resolved(resolve(recipe, size), tmp_path) for size in (1, 2))
    assert one.path == two.path and one.sha256 != two.sha256
    assert ResolvedRecipe.from_yaml(two.path.read_text()).world_size == 2


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    resolved = resolve(load_recipe(write(tmp_path, PRETRAINING)), 1)
    expected = r"run directory: .*/run could not be written: File exists; nothing was trained\. Free space, or choose"
    with pytest.raises(StorageError, match=expected):
        write_resolved(resolved, tmp_path / "run")
