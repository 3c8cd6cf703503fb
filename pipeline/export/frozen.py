"""Frozen parts of an export: tensors of the folders that the recipe loaded them from, memory-mapped.

transformers loads them, because only it knows what a folder's names mean: tied weights, keys renamed since the file was
written, parts merged into one tensor. Loaded in the type the files hold, its tensors are the mapped files themselves,
and nothing is in memory until it is read; only what transformers has to convert is.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.config.resolve import ResolvedRecipe
from pipeline.errors import CheckpointError
from pipeline.export.entry import Entry, written_dtype
from pipeline.models.exported import Export, init_folders, part_of
from pipeline.models.sources import check_unchanged, source_folders
from pipeline.models.weight_files import weight_files

logger = logging.getLogger(__name__)


def check_sources(resolved: ResolvedRecipe, plan: dict[str, Any]) -> dict[str, Path]:
    """Folders of the frozen parts, with every weight file as the run loaded it.

    Raises:
        CheckpointError: a file has changed, or a frozen part has never been in a folder.
    """
    folders = source_folders(resolved.recipe.model, plan["frozen"])
    new = sorted({part_of(name) for name in plan["frozen"]} - folders.keys())
    if new:
        raise CheckpointError(
            f"model.{new[0]} holds frozen parameters with new (tiny) weights, which no checkpoint and no folder holds; "
            "give the part a path, or train it"
        )
    if plan["frozen"] and not plan.get("sources"):
        logger.warning(
            "the checkpoint does not say what the weight files of its frozen parts were (an earlier release wrote it); "
            "they are taken as they are now"
        )
    check_unchanged(plan.get("sources", {}), folders)
    return folders


def frozen_entries(
    resolved: ResolvedRecipe, plan: dict[str, Any], dtype: torch.dtype, folders: dict[str, Path]
) -> Iterator[Entry]:
    """Parameters the stage froze, by their names in the model.

    Raises:
        CheckpointError: the folders hold other parameters.
    """
    missing = set(plan["frozen"]) - {plan["prefix"] + name for name in plan["tied"]}
    for part, load in _loaders(resolved, dtype, folders).items():
        if not any(part_of(name) == part for name in missing):
            continue
        # a layer that got an adapter has another name in the model than in the folder
        wanted = {name.replace(".base_layer.", "."): name for name in missing}
        for name, tensor in load().items():
            full = wanted.get(name.replace(".base_layer.", "."), "")
            if full in missing:
                missing.discard(full)
                yield _entry(full, tensor, dtype)
    if missing:
        raise CheckpointError(
            f"{len(missing)} frozen parameters were not found where the recipe loads them from, first "
            f"{sorted(missing)[0]}; the source folders changed since training"
        )


def _entry(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> Entry:
    return Entry(name, tuple(tensor.shape), written_dtype(tensor.dtype, dtype), lambda: tensor)


def _loaders(
    resolved: ResolvedRecipe, dtype: torch.dtype, folders: dict[str, Path]
) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    """Part -> what gives its tensors by their names in the stage's module."""
    from pipeline.models.registry import build_visual, load_llm

    model = resolved.recipe.model
    llm, visual, initial = model.llm, model.visual, init_folders(model) if folders else {}
    loaders: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        part: functools.partial(_exported, part, folder) for part, folder in folders.items() if part in initial
    }
    if llm is not None and "llm" in folders.keys() - initial:
        loaders["llm"] = lambda: _named("llm", load_llm(llm, stored_dtype(folders["llm"], dtype)))
    if visual is not None and "visual" in folders.keys() - initial:
        pixels = resolved.recipe.data.image_pixels
        loaders["visual"] = lambda: _named(
            "visual", build_visual(visual, pixels, stored_dtype(folders["visual"], dtype))
        )
    return loaders


def _named(part: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in model.state_dict().items()}


def _exported(part: str, folder: Path) -> dict[str, torch.Tensor]:
    """Of an export that `model.init_from` names."""
    export = Export(folder)
    return {name: export.tensor(name) for name in export.names(part)}


def stored_dtype(folder: Path, otherwise: torch.dtype) -> torch.dtype:
    """The one floating type of a folder's weight files; ``otherwise`` if they hold several or none."""
    found = {dtype for path in weight_files(folder) for dtype in _float_types(path)}
    if len(found) == 1:
        return found.pop()
    logger.info("%s holds %d types of floats; its weights are loaded into memory", folder, len(found))
    return otherwise


def _float_types(path: Path) -> set[torch.dtype]:
    if path.suffix != ".safetensors":
        held = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        return {tensor.dtype for tensor in held.values() if tensor.is_floating_point()}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    names = {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}
    return {_FLOATS[name] for name in names if name in _FLOATS}


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
