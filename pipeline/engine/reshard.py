"""Resume at another world size: ZeRO shards -> DeepSpeed's universal checkpoint (arXiv 2406.18820)."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.engine.checkpoint import TAG, Checkpoint, universal_folder, universal_tag
from pipeline.engine.durable import sha256_of, write_durably
from pipeline.errors import CheckpointError

logger = logging.getLogger(__name__)


def to_universal(checkpoint: Checkpoint, workers: int = 1) -> Path:
    """Convert once (later calls reuse the result); returns the folder to load from.

    Runs in its own process, because the converter parses arguments and forks. Only one rank may call.

    Raises:
        CheckpointError: the converter failed; its last lines are in the message.
    """
    folder = universal_folder(checkpoint.path)
    if (folder / "COMPLETE").is_file():
        if (folder / "COMPLETE").read_text(encoding="utf-8") == _fingerprint(folder):
            return folder
        logger.warning("%s was damaged or made by an earlier release; converting again", folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
        "--input_folder", str(checkpoint.path / TAG), "--output_folder", str(folder / universal_tag(checkpoint)),
        "--inject_missing_state", "--num_extract_workers", str(workers), "--num_merge_workers", str(workers),
    ]  # fmt: skip
    logger.info("converting %s for another world size", checkpoint.path)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        tail = "\n  ".join((result.stdout + result.stderr).strip().splitlines()[-8:])
        raise CheckpointError(f"converting {checkpoint.path} to another world size failed:\n  {tail}")
    write_durably(folder / "COMPLETE", _fingerprint(folder))
    return folder


def _fingerprint(folder: Path) -> str:
    """sha256 over the names and bytes of every converted file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
    sums = "".join(f"{path.relative_to(folder)} {sha256_of(path)}\n" for path in files)
    return hashlib.sha256(sums.encode()).hexdigest()
