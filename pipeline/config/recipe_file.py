"""``recipe.resolved.yaml`` in a run directory: written once by the process that resolves it, read by every rank."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.resolve import ResolvedRecipe
from pipeline.errors import StorageError
from shards.atomic import write_atomic

RESOLVED_RECIPE, RESOLVED_DS_CONFIG = "recipe.resolved.yaml", "ds_config.resolved.json"


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A run's resolved recipe, as its ranks must find it."""

    path: Path
    sha256: str
    """Of its bytes, in hexadecimal."""

    @property
    def run_dir(self) -> Path:
        return self.path.parent


def recipe_file(resolved: ResolvedRecipe, run_dir: Path) -> RecipeFile:
    """What `write_resolved` would write there; writes nothing."""
    return RecipeFile(run_dir / RESOLVED_RECIPE, hashlib.sha256(resolved.to_yaml().encode()).hexdigest())


def write_resolved(resolved: ResolvedRecipe, run_dir: Path) -> RecipeFile:
    """Write ``recipe.resolved.yaml`` and ``ds_config.resolved.json`` into the run directory; each whole or absent.

    Raises:
        StorageError: the run directory cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir / RESOLVED_RECIPE, resolved.to_yaml())
        write_atomic(run_dir / RESOLVED_DS_CONFIG, json.dumps(resolved.ds_config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise StorageError(
            f"run directory: {error.filename or run_dir} could not be written: {error.strerror}; nothing was trained. "
            "Free space, or choose another run_dir"
        ) from error
    return recipe_file(resolved, run_dir)


__all__ = ["RESOLVED_DS_CONFIG", "RESOLVED_RECIPE", "RecipeFile", "recipe_file", "write_resolved"]
