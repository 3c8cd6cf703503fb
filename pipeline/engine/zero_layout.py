"""Where DeepSpeed 0.19.8 puts the elements of every trained parameter; equal for a checkpoint and for a live engine.

Weights and Adam's moments are kept in fp32, also when the model is in bf16, and are cut into shards alike:

- stage 0 does not cut: whole tensors, counted as the optimizer counts its parameters;
- stages 1 and 2 put the parameters of a group one after another and cut the whole into equal parts, one per rank; the
  last parts may be filled up;
- stage 3 cuts every parameter into equal parts, one per rank, the last one filled up, and puts a rank's parts of a
  (sub-)group one after another.

Frozen parameters are in no shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

Cut = Literal["nothing", "groups", "parameters"]


class Piece(NamedTuple):
    """Neighbouring elements of a parameter: ``[start, stop)`` of flat tensor ``group`` of a rank."""

    rank: int
    group: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ZeroLayout:
    """Two equal layouts open each other's shards."""

    cut: Cut
    world_size: int
    shapes: dict[str, torch.Size]
    """By name of the trained parameter, tied ones once."""
    places: dict[str, tuple[int, int]]
    """Group and first element: in the flat tensors of all ranks (groups are cut), of each rank (parameters are)."""
    parts: tuple[int, ...] = ()
    """Elements of each group on each rank, filling included; only if groups are cut."""

    def pieces(self, name: str) -> Iterator[Piece]:
        """Where a parameter's elements are, in their order. Under stage 0 every rank holds what rank 0 does."""
        numel, (group, offset) = self.shapes[name].numel(), self.places[name]
        if self.cut == "nothing":
            yield Piece(0, group, 0, numel)
        elif self.cut == "parameters":
            part = _part_of(numel, self.world_size)
            for rank in range(self.world_size):
                length = min(part, numel - rank * part)
                if length > 0:
                    yield Piece(rank, group, offset, offset + length)
        else:
            while numel > 0:
                rank, start = divmod(offset, self.parts[group])
                length = min(numel, self.parts[group] - start)
                yield Piece(rank, group, start, start + length)
                offset, numel = offset + length, numel - length

    def length(self, group: int) -> int:
        """Elements of a group on each rank, filling included; for layouts that cut."""
        if self.cut == "groups":
            return self.parts[group]
        names = (name for name, (of, _) in self.places.items() if of == group)
        return sum(_part_of(self.shapes[name].numel(), self.world_size) for name in names)

    def groups(self) -> list[list[str]]:
        """Names by group, in the order of their elements."""
        found: dict[int, list[str]] = {}
        for name in sorted(self.places, key=lambda name: self.places[name]):
            found.setdefault(self.places[name][0], []).append(name)
        return [found[group] for group in sorted(found)]


def uncut(shapes: dict[str, torch.Size], world_size: int, groups: Sequence[Mapping[str, Any]] = ()) -> ZeroLayout:
    """Stage 0.

    Args:
        groups: the optimizer's, which counts parameters in their order. Those that earlier releases saved hold no
            names: there were two, decayed parameters first.
    """
    counted = [name for group in groups for name in group.get("names", ())]
    counted = counted or sorted(shapes, key=lambda name: len(shapes[name]) < 2)
    places = {name: (number, 0) for number, name in enumerate(counted)}
    return ZeroLayout("nothing", world_size, shapes, places)


def cut_by(groups: Sequence[dict[str, torch.Size]], state: dict[str, Any], stage: int) -> ZeroLayout:
    """Stages 1 to 3.

    Args:
        groups: shapes by name, in the order of the flat tensors; DeepSpeed's ``param_shapes``.
        state: what the optimizer of any rank returns as its state.
        stage: of ZeRO.

    Raises:
        KeyError: the state is not DeepSpeed's.
    """
    counts = state["partition_count"]
    world_size = max(counts) if isinstance(counts, list) else int(counts)
    shapes = {name: torch.Size(shape) for group in groups for name, shape in group.items()}
    if stage == 3:
        places = {}
        for number, group in enumerate(groups):
            offset = 0
            for name in group:
                places[name] = (number, offset)
                offset += _part_of(shapes[name].numel(), world_size)
        return ZeroLayout("parameters", world_size, shapes, places)
    places = {}
    behind = state.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    for number, (group, paddings) in enumerate(zip(groups, behind, strict=True)):
        offset = 0
        for name, padding in zip(group, paddings, strict=True):
            places[name] = (number, offset)
            offset += shapes[name].numel() + padding
    # stored without their filling, except by the optimizer that accumulates in fp32, which does not say its stage
    filling = state["group_paddings"] if "zero_stage" in state else [0] * len(groups)
    stored = state["single_partition_of_fp32_groups"]
    parts = tuple(flat.numel() + fill for flat, fill in zip(stored, filling, strict=True))
    return ZeroLayout("groups", world_size, shapes, places, parts)


def adam_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict of the optimizer that DeepSpeed's wraps, inside the wrapper's."""
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        if key in state:
            return state[key]
    return state


def _part_of(numel: int, world_size: int) -> int:
    """Elements of a parameter on each rank if parameters are cut, filling included."""
    return -(-numel // world_size)
