"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of any model.

Parameters have the names that PEFT gives them (`base_layer`, `lora_A.default`, `lora_B.default`), and new adapters its
starting values, so that its files fit; the base layer and its weight stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel


class LoraLinear(nn.Module):
    """``base_layer(x) + B(A(x)) * alpha / rank``; B starts as zeros, so a new adapter changes nothing.

    Args:
        base_layer: keeps its weights and their name.
        rank: width between A and B.
        alpha: scale of the adapter, times ``rank``.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rank, self.alpha = rank, alpha
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        down = nn.Linear(self.in_features, rank, bias=False)
        up = nn.Linear(rank, self.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        like = base_layer.weight
        self.lora_A = nn.ModuleDict({"default": down}).to(like.device, like.dtype)
        self.lora_B = nn.ModuleDict({"default": up}).to(like.device, like.dtype)

    @property
    def weight(self) -> Tensor:
        """The base layer's: some models ask a layer for its precision."""
        return self.base_layer.weight

    def forward(self, rows: Tensor) -> Tensor:
        down, up = self.lora_A["default"], self.lora_B["default"]
        result: Tensor = self.base_layer(rows)
        update: Tensor = up(down(rows)) * (self.alpha / self.rank)
        return result + update


def linear_layers(model: nn.Module) -> list[str]:
    """Layers that an adapter fits, with one or without. Not output heads, whose logits the losses compute in their own
    way, and not those inside `nn.MultiheadAttention`, which reads weights without calling the layer."""
    heads = [part.get_output_embeddings() for part in model.modules() if isinstance(part, PreTrainedModel)]
    adapted = adapted_layers(model)
    inside = tuple(f"{name}." for name in adapted)
    plain = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and not isinstance(layer, NonDynamicallyQuantizableLinear)
        and not any(layer is head for head in heads)
        and not name.startswith(inside)
    ]
    return [*plain, *adapted]


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers that have an adapter."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def matching(layers: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Those whose name ends as a pattern says; all without patterns."""
    if not targets:
        return list(layers)
    return [
        name for name in layers if any(fnmatchcase(name, text) or fnmatchcase(name, f"*.{text}") for text in targets)
    ]


def add_lora(model: nn.Module, layers: Iterable[str], rank: int, alpha: float) -> None:
    """Put a new adapter on each of these layers, in place. What trains is for the caller to say."""
    for name in layers:
        holder, _, last = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear), name
        setattr(model.get_submodule(holder), last, LoraLinear(layer, rank, alpha))


def described(layers: Mapping[str, LoraLinear]) -> list[dict[str, Any]]:
    """Adapters as plain data, those of one rank and scale together: `add_described` makes them again."""
    groups: dict[tuple[int, float], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.rank, layer.alpha), []).append(name)
    return [{"rank": rank, "alpha": alpha, "layers": names} for (rank, alpha), names in groups.items()]


def add_described(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Adapters as a config describes them."""
    for group in groups:
        add_lora(model, group["layers"], group["rank"], group["alpha"])


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as if none of its layers had an adapter."""
    scales = {layer: layer.alpha for layer in adapted_layers(model).values()}
    for layer in scales:
        layer.alpha = 0.0
    try:
        yield
    finally:
        for layer, alpha in scales.items():
            layer.alpha = alpha


def record_adapters(model: nn.Module) -> None:
    """Write into the configs which layers have adapters, so that exports carry them: each into the innermost model
    whose config has a place for it."""
    owners = [part for part in model.modules() if hasattr(getattr(part, "config", None), "adapters")]
    taken: set[LoraLinear] = set()
    for owner in reversed(owners):  # modules come from the outside in
        config: Any = owner.config
        own = {name: layer for name, layer in adapted_layers(owner).items() if layer not in taken}
        taken |= set(own.values())
        short_form = bool(getattr(config, "lora_rank", 0))  # says so itself for the whole backbone
        config.adapters = described(
            {name: layer for name, layer in own.items() if not (short_form and name.startswith("backbone."))}
        )


__all__ = [
    "LoraLinear",
    "adapted_layers",
    "add_described",
    "add_lora",
    "described",
    "linear_layers",
    "matching",
    "record_adapters",
    "without_adapters",
]
