"""A launch in which every host has a launcher of its own (no ssh, or torchrun): the first writes the recipe and holds
the run directory, the others wait until they see exactly the recipe that they have resolved themselves."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.lock import BEAT_SECONDS, look
from launch.status import read_status
from pipeline.config.recipe_file import RESOLVED_RECIPE, write_resolved
from pipeline.config.resolve import ResolvedRecipe
from pipeline.errors import ClusterError, RecipeError, StorageError

log = logging.getLogger(__name__)

WAIT_SECONDS = 600.0
"""For the first host's launcher to start."""
_SETTLE_SECONDS = 30.0  # its lock is there first, and a shared disk shows a new file a while later
_POLL_SECONDS = 0.5
_SHOWN = 8


def lead(resolved: ResolvedRecipe, run_dir: Path) -> None:
    """On the first host, inside the run directory's lock: let the other hosts start.

    Raises:
        StorageError: the run directory cannot be written.
    """
    try:
        for note in (run_dir / "logs").glob("exit-rank-*.json"):  # of an earlier launch; the others must not read them
            note.unlink()
    except OSError as error:
        raise StorageError(f"{error.filename} could not be removed: {error.strerror}; nothing was started") from error
    write_resolved(resolved, run_dir)


def follow(resolved: ResolvedRecipe, run_dir: Path, seconds: float = WAIT_SECONDS) -> None:
    """On any other host: wait for the first one, and compare its recipe with what this host has resolved.

    Raises:
        ClusterError: the first host does not start, or resolves the recipe to something else.
        RecipeError: another launch uses the run directory.
    """
    mine, path = resolved.to_yaml(), run_dir / RESOLVED_RECIPE
    end, differs_since = time.monotonic() + seconds, None
    log.info("waiting for the first host to write %s", path)
    while True:
        holder = look(run_dir)
        if holder is not None and holder[1] < 3 * BEAT_SECONDS:
            _refuse_another(run_dir, holder[0])
            there = _text(path)
            if there == mine:
                return
            differs_since = differs_since or time.monotonic()
            if time.monotonic() - differs_since >= _SETTLE_SECONDS:
                raise ClusterError(
                    f"{path}, which the first host wrote, {_difference(there, mine)}; nothing was started"
                )
        if time.monotonic() > end:
            raise ClusterError(
                f"no launch holds {run_dir} after {seconds:.0f} s: start the first host (--node-rank 0) with the same "
                "command; run_dir must be on storage that all hosts share"
            )
        time.sleep(_POLL_SECONDS)


def _refuse_another(run_dir: Path, launch_id: str) -> None:
    """A launch that trains already does not wait for this host; the first host of ours is refused there as well."""
    status = read_status(run_dir)
    if status is not None and status.get("launch_id") == launch_id and status.get("total_steps"):
        raise RecipeError(
            f"{run_dir} is in use by launch {launch_id}, which trains already, without this host. Wait for it, stop it "
            f"(slt launch stop {run_dir}), or choose another one with --run-dir"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _difference(there: str, mine: str) -> str:
    if not there:
        return "is not there; run_dir must be on storage that all hosts share"
    other, own = (dict(_flat(yaml.safe_load(text))) for text in (there, mine))
    names = [name for name in {**other, **own} if other.get(name) != own.get(name)]
    lines = [f"\n  {name}: {other.get(name)!r} there, {own.get(name)!r} here" for name in names[:_SHOWN]]
    more = f"\n  and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"differs from what this host resolves:{''.join(lines)}{more}\n"
        "every host needs the same command, code and packages"
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


__all__ = ["WAIT_SECONDS", "follow", "lead"]
