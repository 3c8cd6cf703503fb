"""The files of a checkpoint: what each rank writes, then what makes them a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.checkpoint import FORMAT_VERSION, TAG, universal_folder
from pipeline.engine.durable import failed_writes_as_os_error, sha256_of, write_durably
from pipeline.engine.saving.publish import publish, temporary_folder
from pipeline.engine.saving.retention import set_foreign_aside
from pipeline.engine.saving.snapshot import Captured
from pipeline.stages.base import AnyStage
from shards.atomic import sync_folder

Parts = dict[str, dict[str, Any]]
"""Name in the checkpoint -> ``size`` and ``sha256``."""


@dataclasses.dataclass(frozen=True, slots=True)
class RankFiles:
    """What one rank writes into a checkpoint; none of it changes while it is written."""

    folder: Path
    rank: int
    captured: Captured
    random: dict[str, Any]
    """As `pipeline.engine.state.rng_state` gives it."""
    small: dict[str, bytes]
    probe: dict[str, torch.Tensor]
    """Empty on all ranks but 0, like ``small``, and in a checkpoint without live outputs."""

    def write(self) -> Parts:
        """Write, flush to the disk and hash; returns what was written.

        Raises:
            OSError: a file could not be written.
        """
        parts: Parts = {}
        for file, what, write in self._writers():
            file.parent.mkdir(parents=True, exist_ok=True)
            with failed_writes_as_os_error(what):
                write()
            parts |= self._part(file)
        for copy_script in self.captured.scripts:
            copy_script()
        for file in self._past_the_engine():
            parts |= self._part(file)
        for folder in {(self.folder / name).parent for name in parts}:
            sync_folder(folder)
        return parts

    def _writers(self) -> Iterator[tuple[Path, str, Callable[[], Any]]]:
        for file, write in self.captured.files.items():
            yield file, "the ZeRO shards", write
        file = self.folder / f"rng-rank-{self.rank}.pt"
        yield file, file.name, partial(torch.save, self.random, file)
        for name, content in self.small.items():
            file = self.folder / name
            yield file, name, partial(file.write_bytes, content)
        if self.probe:
            file = self.folder / "probe.safetensors"
            contiguous = {name: value.contiguous() for name, value in self.probe.items()}
            yield file, file.name, partial(save_file, contiguous, file)

    def _past_the_engine(self) -> list[Path]:
        """Files that DeepSpeed writes without its checkpoint engine: scripts, and state offloaded to NVMe."""
        offloaded = self.folder / TAG / "offloaded_tensors" / f"rank{self.rank:02d}"
        found = [path for path in offloaded.rglob("*") if path.is_file()]
        return found + (list(self.folder.glob("*.py")) if self.captured.scripts else [])

    def _part(self, file: Path) -> Parts:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        return {str(file.relative_to(self.folder)): {"size": file.stat().st_size, "sha256": sha256_of(file)}}


def export_files(stage: AnyStage, folder: Path) -> dict[str, bytes]:
    """The small files an export needs beside the weights, by name; they are the same in all checkpoints of a run.

    Args:
        folder: where they may be written for a moment.

    Raises:
        OSError: they do not fit there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        failed_writes_as_os_error("the export files"),
        tempfile.TemporaryDirectory(dir=folder, prefix=temporary_folder(Path("step-files-")).name) as name,
    ):
        plan = stage.write_export_files(Path(name))
        (Path(name) / "export.json").write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        return {f"hf/{path.relative_to(name)}": path.read_bytes() for path in files}


def complete(final: Path, resolved: ResolvedRecipe, world_size: int, parts: Parts) -> None:
    """Turn the files that all ranks wrote into the checkpoint ``final``. Only one rank may call.

    Raises:
        OSError: the manifest or a name could not be written.
    """
    manifest = {
        "format_version": FORMAT_VERSION, "step": int(final.name.removeprefix("step-")), "world_size": world_size,
        "zero_stage": resolved.ds_config["zero_optimization"]["stage"], "stage": resolved.recipe.stage,
        "versions": resolved.versions, "git_commit": resolved.git_commit, "time": round(time.time()),
        "parts": dict(sorted(parts.items())),
    }  # fmt: skip
    write_durably(temporary_folder(final) / "manifest.json", json.dumps(manifest, indent=1))
    shutil.rmtree(universal_folder(final), ignore_errors=True)  # converted from an earlier attempt
    set_foreign_aside(final)
    publish(final)
    (final.parent / "latest").unlink(missing_ok=True)  # earlier releases wrote it, and nothing moves it any more
