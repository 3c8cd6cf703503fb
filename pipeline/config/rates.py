"""The learning rate of every trained parameter, from `train.parts`. Reads names only, so the planner can do it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.parts_schema import PartConfig, part_of
from pipeline.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Rate:
    """What the parameters of one optimizer group share."""

    part: str = ""
    """Path in `train.parts`; empty for everything it does not name."""
    scale: float = 1.0
    """Times the rate of `train.optimizer`."""
    start_step: int = 0
    """First step at which it is not 0."""


def rates_of(names: Sequence[str], parts: Mapping[str, PartConfig], lr: float) -> dict[str, Rate]:
    """Each trained parameter's rate.

    Args:
        names: all parameters of the model, trained or not, in its order: layers are counted in it.
        parts: `train.parts`.
        lr: `train.optimizer.lr`.

    Raises:
        RecipeError: rates should fall from layer to layer where there are none.
    """
    rates: dict[str, Rate] = {}
    for path in dict.fromkeys(part_of(name, parts) for name in names):
        own = [name for name in names if part_of(name, parts) == path]
        if not path:
            rates |= dict.fromkeys(own, Rate())
            continue
        part = parts[path]
        below = _layers_above(own) if part.lr_decay < 1 else dict.fromkeys(own, 0)
        if part.lr_decay < 1 and not any(below.values()):
            raise RecipeError(
                f"train.parts.{path}.lr_decay={part.lr_decay}: {path} has no numbered layers over which its rate could"
                " fall; leave lr_decay out, or name a part with layers"
            )
        peak = lr if part.lr is None else part.lr
        for name in own:
            rates[name] = Rate(path, peak * part.lr_decay ** below[name] / lr, part.start_step)
    return rates


def _layers_above(names: Sequence[str]) -> dict[str, int]:
    """How many layers of a part follow each parameter's own. Layers are what the outermost numbers in names count;
    what stands between two of them belongs to the lower one, what stands before the first to none."""
    layers: dict[str, int] = {}
    reached: dict[str, int] = {}
    for name in names:
        words = name.split(".")
        number = next((at for at, word in enumerate(words) if word.isdigit()), None)
        if number is None:
            reached[name] = len(layers)
        else:
            layer = ".".join(words[: number + 1])
            reached[name] = layers.setdefault(layer, len(layers) + 1)
    return {name: len(layers) - at for name, at in reached.items()}


__all__ = ["Rate", "rates_of"]
