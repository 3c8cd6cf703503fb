"""Whether a language model was trained on the sentences that a later stage is scored on.

An export says in ``recipe.resolved.yaml`` what it was trained on. If the text sets still exist, an evaluation's
sentences are looked up in them: scores on sentences that the language model has read measure memory.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.source import read_document
from shards.errors import DataError
from shards.filter.known_texts import KnownTexts, known_texts
from shards.format.index import MANIFEST_NAME
from shards.storage.store import open_folder

log = logging.getLogger(__name__)
RECIPE = "recipe.resolved.yaml"
_TEXT_STAGE = "continued_pretraining"


def training_texts(export: str | Path) -> list[tuple[str, str]]:
    """(shard set, split) of the texts that an export's language model was trained on; empty if none is recorded.

    Args:
        export: of stage 1, or of a later stage whose recipe names the export of its language model.
    """
    seen: set[Path] = set()
    folder = Path(export)
    while folder not in seen and (folder / RECIPE).is_file():
        seen.add(folder)
        recipe = read_document(folder / RECIPE).data
        if recipe.get("stage") == _TEXT_STAGE:
            sources = _value(recipe, "data", "train") or []
            return [(str(source["shards"]), str(source.get("split", "train"))) for source in sources]
        folder = Path(str(_value(recipe, "model", "llm", "path")))
    return []


def _value(recipe: Any, *names: str) -> Any:
    for name in names:
        recipe = recipe.get(name) if isinstance(recipe, dict) else None
    return recipe


def warn_of_known_texts(
    export: str | Path | None, texts: Sequence[str], storage_options: Mapping[str, object] | None = None
) -> dict[str, object] | None:
    """Warn of evaluation texts that an export's language model was trained on.

    Args:
        export: folder of the language model; None if there is none.
        texts: the references of the evaluation, one per sample.
        storage_options: of the object store that holds the text sets.

    Returns:
        The findings, for a report; None if they are unknown.
    """
    sources = training_texts(export) if export is not None else []
    if not sources or not texts:
        return None
    folders = [(open_folder(location, storage_options), split) for location, split in sources]
    names = ", ".join(location for location, _ in sources)
    try:
        gone = [folder.location for folder, _ in folders if not folder.exists(MANIFEST_NAME)]
        if gone:
            log.info("%s: its training texts (%s) no longer exist, so they are not compared", export, gone[0])
            return None
        overlap = known_texts(texts, folders)
    except DataError as error:
        log.warning("%s: its training texts cannot be compared: %s", export, error)
        return None
    if overlap.known:
        _warn(overlap, names)
    return {"shards": dict(sources), **dataclasses.asdict(overlap)}


def _warn(overlap: KnownTexts, names: str) -> None:
    log.warning(
        "%d of %d evaluation texts are among the%s %d documents that the language model was trained on (%s), such as"
        " %r: scores on them measure memory. Build the text from the training split of the videos:"
        " slt shards build text --paths train=VIDEO_SET",
        overlap.known,
        overlap.samples,
        "" if overlap.complete else " first",
        overlap.documents,
        names,
        overlap.example,
    )
