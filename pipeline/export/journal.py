"""What an interrupted export has finished: its next start takes these files over and writes the others."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from pipeline.engine.durable import sha256_of, write_durably

logger = logging.getLogger(__name__)

_NAME = ".journal.json"


class Journal:
    """Finished files in a temporary folder, with size and sha256.

    Args:
        folder: the temporary folder; it may not exist, or be of another export, see `begin`.
        export: all that decides the bytes of the files: checkpoint, types, names, sizes, options.
    """

    def __init__(self, folder: Path, export: dict[str, Any]) -> None:
        self.folder, self.path = folder, folder / _NAME
        self.identity = hashlib.sha256(json.dumps(export, sort_keys=True).encode()).hexdigest()
        self.files: dict[str, dict[str, Any]] = {}
        recorded = self._read()
        if recorded.get("export") == self.identity:
            self.files = {name: file for name, file in recorded["files"].items() if self._intact(name, file)}
            logger.info("%s: %d finished files of an interrupted export are kept", folder, len(self.files))

    def begin(self) -> None:
        """Make the folder ready to be written to; empty, if no file in it is kept."""
        if not self.files:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)

    def add(self, name: str, sha256: str) -> None:
        """Record a file that is on the disk under its name."""
        self.files[name] = {"size": (self.folder / name).stat().st_size, "sha256": sha256}
        write_durably(self.path, json.dumps({"export": self.identity, "files": self.files}))

    def close(self) -> None:
        """The export is finished."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        """Empty if there is none, or none that can be read."""
        try:
            recorded: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValueError as error:
            logger.warning("%s is damaged (%s); the export starts from the beginning", self.path, error)
            return {}
        return recorded

    def _intact(self, name: str, file: dict[str, Any]) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == file["size"] and sha256_of(path) == file["sha256"]
