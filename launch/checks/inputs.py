"""Does every host read the same shards and models? Same names with other bytes give a run that nobody can explain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.checks.base import HostCheck, Launch, odd_ones
from pipeline.config.checks import is_remote
from pipeline.config.pretrained import parts_of

SHARDS = 8
"""Shards of every set of which first and last bytes are read, evenly spread."""
_ENDS = 4096
_WHOLE = 16 << 20
_SMALL = ("manifest.json", "index.parquet", "config.json", "tokenizer.json")


class Inputs(HostCheck):
    """A fingerprint of every folder that the recipe names; those in object stores and on the hub are one anyway."""

    name = "inputs"

    def question(self, launch: Launch) -> list[str]:
        """Folders; none on one machine, where nobody else reads them."""
        if launch.marker is None:
            return []
        data = launch.recipe.data
        sets = [source.shards.removeprefix("file://") for source in (*data.train, *data.eval)]
        models = [part.path for part in parts_of(launch.recipe)]
        local = [Path(path) for path in dict.fromkeys([*sets, *models]) if not is_remote(path)]
        return [str(path.absolute()) for path in local if path.is_dir()]  # hosts look from another folder

    def look(self, question: Any) -> dict[str, str]:
        """Folder -> fingerprint, or why it has none."""
        return {folder: _fingerprint(Path(folder)) for folder in question}

    def compare(self, launch: Launch, answers: Mapping[str, Any]) -> dict[str, str]:
        mine, reasons = self.look(self.question(launch)), dict[str, str]()
        for folder, fingerprint in mine.items():
            values = {host: answer.get(folder, "") for host, answer in answers.items()}
            _, odd = odd_ones(values, fingerprint)
            broken = {host: value.partition(" ")[2] for host, value in values.items() if value.startswith("!")}
            for host in dict.fromkeys([*odd, *broken]):
                said = f"cannot read {broken[host]}" if host in broken else f"has another {folder} than the others"
                reasons.setdefault(host, f"{said}; copy it again, or correct its mount")
        return reasons


def _fingerprint(folder: Path) -> str:
    """Hash of the small files, of the names and sizes of all, and of the ends of some shards."""
    digest = hashlib.sha256()
    try:
        for file in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")):
            digest.update(f"{file.name} {file.stat().st_size}\0".encode())
        for name in _SMALL:
            if (folder / name).is_file():
                digest.update(_ends(folder / name, _WHOLE))
        for shard in _some_shards(folder):
            digest.update(_ends(folder / shard, _ENDS))
    except (OSError, ValueError) as error:
        return f"! {getattr(error, 'filename', None) or folder} ({getattr(error, 'strerror', None) or error})"
    return digest.hexdigest()[:16]


def _some_shards(folder: Path) -> list[str]:
    manifest = folder / "manifest.json"
    names = [str(shard["name"]) for shard in json.loads(manifest.read_text())["shards"]] if manifest.is_file() else []
    count = min(len(names), SHARDS)
    return [names[number * len(names) // count] for number in range(count)]


def _ends(file: Path, count: int) -> bytes:
    """The size of a file and its first and last bytes."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        first = handle.read(count)
        handle.seek(max(size - count, 0))
        return size.to_bytes(8, "little") + first + handle.read(count)


__all__ = ["SHARDS", "Inputs"]
