"""What pip installs with this project is what its code imports."""

from __future__ import annotations

import re
import tomllib

from tests.source_tree import LIBRARY, ROOT, imported_modules, sources

IMPORTED_AS = {"pyyaml": "yaml", "pillow": "PIL"}
NOT_IMPORTED = {
    "tensorboard": "torch.utils.tensorboard imports it",
    "webdataset": "reads the shards of this project in its tests, as its users may",
}


def test_every_dependency_is_imported_by_shipped_code() -> None:
    """What only tests need belongs to the extra dev; what one command needs to an extra of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}
    imported = {name.split(".")[0] for source in sources(*LIBRARY) for _, name in imported_modules(source)}
    assert {IMPORTED_AS.get(name, name) for name in names} - imported == set(NOT_IMPORTED)


def test_dev_has_the_extras_that_tests_need() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "llava-slt[s3,ray,lmdb,plots,stacks]" in extras["dev"]


def test_every_package_is_installed() -> None:
    """A room that pyproject.toml does not list works in a checkout and is missing from what pip installs."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    ours = {s.module for s in sources(*LIBRARY, "ds_configs") if s.path.endswith("/__init__.py")}
    assert sorted(listed) == sorted(ours)
