"""A finished run -> a Hugging Face folder: safetensors, config, tokenizer, processor, generation config, model card.

The checkpoint carries the small files (``hf/``, written by the stage when it was saved), so an export needs neither
the hub nor the engine. Frozen parts are read from the recipe's source folders. Tensors pass through memory one at a
time; a tensor is never split, so the largest one is the bound.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from pipeline.engine.checkpoint import Checkpoint, best_checkpoint, damage, latest_checkpoint, open_checkpoint
from pipeline.errors import CheckpointError, DamagedCheckpointError
from pipeline.export.card import write_card
from pipeline.export.contents import Contents, Lora
from pipeline.export.journal import Journal
from pipeline.export.target import only_writer, publish, temporary_folder
from pipeline.export.verify import verify_export
from pipeline.export.weights import Show, check_room, write_weights

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 4 * 1024**3


def find_checkpoint(source: Path, which: str) -> Checkpoint:
    """A checkpoint folder itself, or the ``best`` or ``latest`` of a run folder, with every byte verified.

    In a run folder, the newest intact one replaces a damaged one, with a message, unless the run's recipe says
    otherwise; a checkpoint folder is never replaced.

    Raises:
        CheckpointError: nothing complete there.
        DamagedCheckpointError: nothing intact there.
    """
    if re.fullmatch(r"step-\d+", source.name) or (source / "manifest.json").is_file():
        problems = damage(source)
        if problems:
            raise DamagedCheckpointError(
                f"checkpoint {source} is damaged:\n  " + "\n  ".join(problems)
                + "\n  fix: restore these files from a copy, or choose another checkpoint (`slt ckpt list RUN_DIR`)"
            )  # fmt: skip
        return open_checkpoint(source)
    if which == "best":
        return best_checkpoint(source)
    checkpoint = latest_checkpoint(source)
    if checkpoint is None:
        raise CheckpointError(f"no complete checkpoint in {source}/checkpoints; train first, or check the path")
    return checkpoint


def export(
    source: Path,
    out: Path,
    which: str = "best",
    check: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    lora: Lora = "merge",
    show: Show = lambda done, total, note, before: None,
) -> dict[str, float]:
    """Export a run's checkpoint to ``out`` (complete or absent) and compare it with the live model's outputs.

    An export that was killed left its finished files beside ``out``; the next one of the same checkpoint goes on there.

    Args:
        lora: add adapters to the weights they adapt, or keep them.
        show: told of every tensor written.

    Returns:
        Largest absolute difference per compared output, empty without ``check``.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or holds no live outputs to compare with, a file that
            frozen parts come from has changed, the disk has no room, another export to ``out`` runs, or the exported
            model does not equal the live one.
    """
    checkpoint = find_checkpoint(source, which)
    if check:
        checkpoint.probe()  # refuses before anything is written
    temporary = temporary_folder(out)
    try:
        with only_writer(out):
            contents = Contents.of(checkpoint, max_shard_bytes, lora)
            journal = Journal(temporary, contents.identity())
            check_room(contents.weights, journal)
            try:
                journal.begin()
                contents.write_small_files(temporary)
                write_weights(contents.weights, journal, contents.mapped(), show)
                differences = verify_export(temporary, checkpoint, contents.resolved) if check else {}
                write_card(temporary, checkpoint, contents.resolved, source, differences)
                journal.close()
                publish(temporary, out)
            except (OSError, CheckpointError):
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except OSError as error:
        raise CheckpointError(f"export to {out} could not be written: {error}; nothing was left behind") from error
    logger.info("exported %s to %s", checkpoint.path, out)
    return differences
