"""Do the weights of the pretrained parts reach the run? Frameworks that initialise a model after it was loaded, or load
it into copies, train from new weights without a word; only a loss as from scratch tells."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from pipeline import dist
from pipeline.config.schema import ModelConfig
from pipeline.errors import CheckpointError

logger = logging.getLogger(__name__)

SAMPLES = 3
"""Tensors of every part that are compared."""
_MOST_ELEMENTS = 1 << 24

_Found = tuple[str, str, Path, str]
"""Parameter, the setting that names its part, file, name in the file."""


def check_loaded(module: nn.Module, model: ModelConfig, started_from: Mapping[str, Path] | None = None) -> None:
    """Compare a few tensors of every part with the files of its folder, as long as no step has changed them.

    Parts without a folder on this machine, and tensors that have another name or form in the model, are left out. All
    ranks must call.

    Args:
        started_from: part -> the export that its weights came from by `model.init_from`.

    Raises:
        CheckpointError: on every rank: names the first tensor that differs, and its file.
    """
    # a layer that got an adapter has another name in the model than in the folder
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in module.named_parameters()}
    found = list(_sampled(parameters, model, started_from or {})) if dist.ranks_from_environment().is_main else []
    found = dist.broadcast_object(found)
    problem = ""
    for name, setting, file, stored in found:
        with _whole(parameters[name]):
            if not problem and dist.ranks_from_environment().is_main:
                problem = _difference(parameters[name], setting, file, stored)
    if problem := dist.broadcast_object(problem):
        raise CheckpointError(problem)
    if found:
        logger.info("%d sampled tensors equal those of their files", len(found))


def _sampled(
    parameters: dict[str, nn.Parameter], model: ModelConfig, started_from: Mapping[str, Path]
) -> Iterator[_Found]:
    for prefix, setting, path in _parts(model, started_from):
        files = sorted(Path(path).glob("*.safetensors")) if path is not None else []
        known = [
            (name, setting, file, stored)
            for file in files
            for stored, shape in _shapes(file)
            if (name := _name_in(parameters, prefix, stored, shape))
        ]
        step = max(1, -(-len(known) // SAMPLES))
        yield from known[::step]


def _parts(model: ModelConfig, started_from: Mapping[str, Path]) -> Iterator[tuple[str, str, str | None]]:
    """Where a part is in the module, the setting that names it, its folder or hub id."""
    for part, folder in started_from.items():
        yield "" if part == "heads" else f"{part}.", f"model.init_from ({part})", str(folder)
    if model.llm is not None and "llm" not in started_from:
        yield "llm.", "model.llm.path", model.llm.path
    if model.visual is not None and "visual" not in started_from:
        yield "visual.", "model.visual.path", model.visual.path
        if model.visual.backbone is not None:
            yield "visual.backbone.model.", "model.visual.backbone.path", model.visual.backbone.path


def _shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    with safe_open(file, "pt") as tensors:
        yield from ((name, tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _name_in(parameters: dict[str, nn.Parameter], prefix: str, stored: str, shape: list[int]) -> str:
    """The parameter that a stored tensor became, if its name says so; matrices only, because norms begin as ones."""
    stored = stored.replace(".base_layer.", ".")
    names = (prefix + stored, prefix + stored.partition(".")[2], f"{prefix}model.{stored}")
    return next((name for name in names if name in parameters and _fits(parameters[name], shape)), "")


def _fits(parameter: Any, shape: list[int]) -> bool:
    whole = torch.Size(shape)
    return (
        getattr(parameter, "ds_shape", parameter.shape) == whole and len(shape) > 1 and whole.numel() < _MOST_ELEMENTS
    )


def _difference(parameter: nn.Parameter, setting: str, file: Path, stored: str) -> str:
    """What is wrong with a parameter; empty if it is what the file holds."""
    with safe_open(file, "pt") as tensors:
        expected = tensors.get_tensor(stored).to(parameter.dtype)
    actual = parameter.detach().cpu()
    if torch.equal(actual, expected):
        return ""
    distance = float((actual.double() - expected.double()).abs().max())
    return (
        f"{setting}: {stored} of {file} did not reach the model, which differs by up to {distance:.3g}; it would train "
        "from other weights. Nothing was trained. If the file did not change meanwhile, this is a bug: please report it"
    )


@contextlib.contextmanager
def _whole(parameter: Any) -> Iterator[None]:
    """The parameter with all its elements, which ZeRO-3 has spread over the ranks."""
    spread = hasattr(parameter, "ds_id")
    if spread:
        parameter.all_gather()
    try:
        yield
    finally:
        if spread:
            parameter.partition()


__all__ = ["SAMPLES", "check_loaded"]
