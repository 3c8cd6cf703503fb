"""Publishes a written checkpoint under its step's name: complete before it has the name, and never in pieces.

A run that repeats a stopped evaluation saves the resumed step again. The older checkpoint stays until the newer one is
whole, and the run that resumes mends a crash between the two renames.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.engine.durable import sha256_of, write_durably
from shards.atomic import put_folder, sync_folder

COMPLETE = "COMPLETE"
"""Its presence makes a folder a checkpoint; it holds the sha256 of the manifest."""
_TEMPORARY, _REPLACED = ".tmp-", ".replaced-"


def temporary_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is published."""
    return final.with_name(f"{_TEMPORARY}{final.name}")


def replaced_folder(final: Path) -> Path:
    """Where a checkpoint is once it has lost its name, until it is removed."""
    return final.with_name(f"{_REPLACED}{final.name}")


def publish(final: Path) -> None:
    """Give the finished temporary folder its name; replaces a complete checkpoint of this name."""
    temporary = temporary_folder(final)
    write_durably(temporary / COMPLETE, sha256_of(temporary / "manifest.json"))
    put_folder(temporary, final, replaced_folder(final))


def finish_interrupted(folder: Path) -> None:
    """Publish checkpoints that a crash left complete but without their name; only one rank may call."""
    for temporary in folder.glob(f"{_TEMPORARY}step-*"):
        final = temporary.with_name(temporary.name.removeprefix(_TEMPORARY))
        if (temporary / COMPLETE).is_file() and not final.exists():
            os.replace(temporary, final)
            sync_folder(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left behind."""
    for pattern in (f"{_TEMPORARY}step-*", f"{_REPLACED}step-*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
