"""Reads the tensors of a DeepSpeed checkpoint by name: any ZeRO stage, any world size, no engine, no process group.

DeepSpeed 0.19.8 stores trained parameters and Adam's moments thus, all in fp32 also when the model is in bf16:

- stage 0: whole tensors, the moments under the parameter's number in the optimizer (bf16: the weights there too);
- stages 1 and 2: the parameters of a group one after another, the whole cut into equal parts, one per rank; the last
  parts may be filled up;
- stage 3: every parameter cut into equal parts, one per rank, the last filled up; a rank's parts of a (sub-)group one
  after another.

Frozen parameters are not stored. Files are mapped, not read: one tensor is assembled at a time, and the pages it was
read from are given back, so memory stays at one tensor whatever the size of the checkpoint.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pipeline.errors import CheckpointError

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")


class _Foreign:
    """Stands for an object of a DeepSpeed class, which reading does not need."""

    def __init__(self, *values: Any) -> None:
        self.values = values


_FOREIGN = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes in DeepSpeed's files besides torch's own; whatever else a file names is not executed."""


class _Place(NamedTuple):
    """Where a parameter is."""

    group: int
    """Which flat tensor of every rank (stages 1 to 3); the number in the optimizer (stage 0)."""
    offset: int
    """First element: over all ranks' flat tensors (stages 1 and 2), in each rank's (stage 3)."""


@dataclass(frozen=True)
class ZeroShards:
    """Trained tensors and buffers of one checkpoint; `tensor` assembles one of them."""

    folder: Path
    zero_stage: int
    world_size: int
    parameters: dict[str, torch.Size]
    """Trained parameters in the model's order."""
    shared: dict[str, str]
    """Name of a tied parameter -> the name under which it is stored."""
    _model: dict[str, Any] = field(repr=False)
    _ranks: list[dict[str, Any]] = field(repr=False)
    """Optimizer state of every rank; of one under stage 0."""
    _places: dict[str, _Place] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> ZeroShards:
        """Map the files in a folder that holds ``*_model_states.pt``; no tensor is read.

        Raises:
            CheckpointError: files are missing, or are not those of a checkpoint of stages 0 to 3.
        """
        models = sorted(folder.glob("*mp_rank_00_model_states.pt"))
        if not models:
            raise CheckpointError(f"{folder} is not a ZeRO checkpoint: it holds no *_model_states.pt")
        model = _mapped(models[0])  # of rank 0, which alone says what is tied
        ranks = [_mapped(file)["optimizer_state_dict"] for file in _optimizer_files(folder)]
        if not ranks:
            return _open_stage_0(folder, model)
        try:
            stage = int(ranks[0]["zero_stage"].values[0])
            counts = ranks[0]["partition_count"]
            groups = model["param_shapes"]
            world_size = max(counts) if isinstance(counts, list) else int(counts)
            places = (
                _places_in_cut_parameters(groups, world_size) if stage == 3 else _places_in_cut_groups(groups, ranks)
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} is not a ZeRO checkpoint: {error!r}") from error
        if len(ranks) != world_size:
            raise CheckpointError(
                f"{folder} is incomplete: {len(ranks)} of {world_size} *_optim_states.pt; restore the missing files"
            )
        shapes = {name: shape for group in groups for name, shape in group.items()}
        parameters = {name: torch.Size(shapes[name]) for name in model["module"] if name in shapes}
        return cls(folder, stage, world_size, parameters, dict(model["shared_params"] or {}), model, ranks, places)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Copies of the persistent buffers, as stored."""
        return {name: self._model["module"][name].detach().clone() for name in self._model["buffer_names"]}

    @property
    def counters(self) -> dict[str, int]:
        """DeepSpeed's own counts of steps."""
        return {key: int(self._model[key]) for key in ("global_steps", "global_samples", "skipped_steps")}

    def tensor(self, name: str, kind: Kind = "weight") -> torch.Tensor:
        """A whole trained parameter, or one of its moments, in fp32; a tied name gives the tensor it is tied to.

        Raises:
            CheckpointError: no trained parameter has this name, or the shards are too short for it.
        """
        name = self.shared.get(name, name)
        shape = self._shape(name)
        whole = torch.zeros(shape.numel(), dtype=torch.float32)
        end = 0
        for stored in self._pieces(name, kind):
            piece = stored.detach()
            whole[end : end + piece.numel()].copy_(piece)
            end += piece.numel()
            _give_back_pages(piece)
        none_yet = self.zero_stage == 0 and kind != "weight" and end == 0  # moments begin as zeros
        if end != whole.numel() and not none_yet:
            raise CheckpointError(
                f"{self.folder} is damaged: {end} of {whole.numel()} elements of {name} ({kind}) are stored"
            )
        return whole.view(shape)

    def step(self, name: str) -> int:
        """Optimizer steps that the moments of a parameter have seen.

        Raises:
            CheckpointError: no trained parameter has this name.
        """
        name = self.shared.get(name, name)
        self._shape(name)
        state = _adam(self._ranks[0], self.zero_stage)["state"]
        return int(state.get(self._places[name].group, {}).get("step", 0))

    def _shape(self, name: str) -> torch.Size:
        if name not in self.parameters:
            raise CheckpointError(f"{self.folder} holds no trained parameter {name}")
        return self.parameters[name]

    def _pieces(self, name: str, kind: Kind) -> Iterator[torch.Tensor]:
        """The flat parts of a tensor, in order."""
        numel, (group, offset) = self.parameters[name].numel(), self._places[name]
        if self.zero_stage == 0:
            stored = self._whole(name, group, kind)
            yield from () if stored is None else (stored.reshape(-1),)
        elif self.zero_stage == 3:
            part = _part_of(numel, self.world_size)
            for rank, state in enumerate(self._ranks):
                length = min(part, numel - rank * part)
                if length > 0:
                    yield self._flat(state, group, kind)[offset : offset + length]
        else:
            part = self._flat(self._ranks[0], group, "exp_avg").numel()
            while numel > 0:
                rank, start = divmod(offset, part)
                length = min(numel, part - start)
                yield self._flat(self._ranks[rank], group, kind)[start : start + length]
                offset, numel = offset + length, numel - length

    def _whole(self, name: str, number: int, kind: Kind) -> torch.Tensor | None:
        """A tensor that stage 0 stores whole; None for moments that no step has made yet."""
        optimizer = self._ranks[0]
        if kind != "weight":
            return _adam(optimizer, 0)["state"].get(number, {}).get(kind)
        masters = [tensor for group in optimizer.get("fp32_groups", ()) for tensor in group]
        return masters[number] if masters else self._model["module"][name]

    def _flat(self, state: dict[str, Any], group: int, kind: Kind) -> torch.Tensor:
        if kind != "weight":
            return _adam(state, self.zero_stage)["state"][group][kind]
        return state["fp32_flat_groups" if self.zero_stage == 3 else "single_partition_of_fp32_groups"][group]


def _mapped(file: Path) -> dict[str, Any]:
    """The contents of a file of torch.save, tensors not read yet."""
    try:
        with torch.serialization.safe_globals([(_Foreign, name) for name in _FOREIGN]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} is not a file of a ZeRO checkpoint: {error}") from error


def _optimizer_files(folder: Path) -> list[Path]:
    """In the order of the ranks."""
    files = folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")
    return sorted(files, key=lambda file: int(file.name.partition("pp_rank_")[2].partition("_")[0]))


def _adam(state: dict[str, Any], zero_stage: int) -> dict[str, Any]:
    """The wrapped optimizer's own state dict."""
    if zero_stage in (1, 2):
        return state["base_optimizer_state"]
    return state.get("optimizer_state_dict", state)


def _part_of(numel: int, world_size: int) -> int:
    """Elements of a parameter on each rank under stage 3, filling included."""
    return -(-numel // world_size)


def _places_in_cut_parameters(groups: list[dict[str, torch.Size]], world_size: int) -> dict[str, _Place]:
    places = {}
    for number, group in enumerate(groups):
        offset = 0
        for name, shape in group.items():
            places[name] = _Place(number, offset)
            offset += _part_of(shape.numel(), world_size)
    return places


def _places_in_cut_groups(groups: list[dict[str, torch.Size]], ranks: list[dict[str, Any]]) -> dict[str, _Place]:
    places = {}
    paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    for number, (group, behind) in enumerate(zip(groups, paddings, strict=True)):
        offset = 0
        for (name, shape), padding in zip(group.items(), behind, strict=True):
            places[name] = _Place(number, offset)
            offset += shape.numel() + padding
    return places


def _open_stage_0(folder: Path, model: dict[str, Any]) -> ZeroShards:
    """The optimizer numbers parameters as `pipeline.engine.setup.parameter_groups` does: decayed ones first."""
    module, shared, parameters = model["module"], {}, {}
    first_at: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in module.items():
        if name in model["buffer_names"]:
            continue
        stored = first_at.setdefault((tensor.data_ptr(), tensor.shape), name)
        if stored == name:
            parameters[name] = tensor.shape
        else:
            shared[name] = stored
    in_optimizer = sorted(parameters, key=lambda name: len(parameters[name]) < 2)
    places = {name: _Place(number, 0) for number, name in enumerate(in_optimizer)}
    optimizer = model["optimizer"]
    shapes = {number: state["exp_avg"].shape for number, state in _adam(optimizer, 0)["state"].items()}
    wrong = [name for name in in_optimizer if shapes.get(places[name].group, parameters[name]) != parameters[name]]
    if wrong:
        raise CheckpointError(f"{folder} is not a checkpoint of this trainer: the moments of {wrong[0]} do not fit it")
    return ZeroShards(folder, 0, int(model["dp_world_size"]), parameters, shared, model, [optimizer], places)


def _give_back_pages(piece: torch.Tensor) -> None:
    """Let the system forget the pages of a mapped tensor that was copied; they can be read again."""
    start = piece.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = piece.data_ptr() + piece.numel() * piece.element_size() - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
