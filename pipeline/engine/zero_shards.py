"""Reads the tensors of a DeepSpeed checkpoint by name: any ZeRO stage, any world size, no engine, no process group.

Files are mapped, not read: a tensor is assembled from the pages it lies on, and these are given back, so memory stays
at one tensor whatever the size of the checkpoint. Frozen parameters are not stored.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.engine.zero_layout import ZeroLayout, adam_state, cut_by, uncut
from pipeline.errors import CheckpointError

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "average"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")
"""In every checkpoint."""
AVERAGE: Kind = "average"
"""A mean of the weight over the steps (`pipeline.engine.averaging`), kept as Adam's moments are."""


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


@dataclass(frozen=True)
class ZeroShards:
    """Trained tensors and buffers of one checkpoint; `tensor` assembles one of them."""

    folder: Path
    zero_stage: int
    layout: ZeroLayout
    parameters: dict[str, torch.Size]
    """Trained parameters in the model's order."""
    shared: dict[str, str]
    """Name of a tied parameter -> the name under which it is stored."""
    _model: dict[str, Any] = field(repr=False)
    _files: list[Path] = field(repr=False)
    """Optimizer state of every rank; none under stage 0."""
    _states: dict[int, dict[str, Any]] = field(repr=False)
    """Those opened so far."""

    @classmethod
    def open(cls, folder: Path) -> ZeroShards:
        """Map the files in a folder that holds ``*_model_states.pt``; no tensor is read.

        Raises:
            CheckpointError: files are missing, or are not those of a checkpoint of stages 0 to 3.
        """
        models = sorted(folder.glob("*mp_rank_00_model_states.pt"))
        if not models:
            raise CheckpointError(f"{folder} is not a ZeRO checkpoint: it holds no *_model_states.pt")
        if (folder / "offloaded_tensors").is_dir():
            raise CheckpointError(
                f"{folder} keeps the optimizer's state as NVMe files, which only a run with the same world size, ZeRO "
                "stage and NVMe offload opens; fix: go on there with offload_optimizer on the cpu, and save once"
            )
        model = _mapped(models[0])  # of rank 0, which alone says what is tied
        files = _optimizer_files(folder)
        try:
            if not files:
                return _uncut_shards(folder, model)
            state = _mapped(files[0])["optimizer_state_dict"]
            stage = int(state["zero_stage"].values[0]) if "zero_stage" in state else 1
            layout = cut_by(model["param_shapes"], state, stage)
            parameters = {name: layout.shapes[name] for name in model["module"] if name in layout.shapes}
            shared = dict(model["shared_params"] or {})
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} is not a ZeRO checkpoint: {error!r}") from error
        if len(files) != layout.world_size:
            raise CheckpointError(
                f"{folder} is incomplete: {len(files)} of {layout.world_size} *_optim_states.pt; restore the missing "
                "files"
            )
        return cls(folder, stage, layout, parameters, shared, model, files, {0: state})

    @property
    def world_size(self) -> int:
        """Ranks that saved it."""
        return self.layout.world_size

    def buffers(self) -> dict[str, torch.Tensor]:
        """Copies of the persistent buffers, as stored."""
        return {name: self._model["module"][name].detach().clone() for name in self._model["buffer_names"]}

    def counts(self) -> dict[str, int]:
        """DeepSpeed's own counts: `global_steps`, `global_samples`, `skipped_steps`."""
        return {key: int(self._model[key]) for key in ("global_steps", "global_samples", "skipped_steps")}

    @property
    def deepspeed_version(self) -> str:
        return str(self._model["ds_version"])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What they hold of every parameter."""
        states = adam_state(self._state(0))["state"].values()
        return (*KINDS, AVERAGE) if any(AVERAGE in state for state in states) else KINDS

    @property
    def exported(self) -> Kind:
        """What an export takes: the mean of the weights if there is one."""
        return AVERAGE if AVERAGE in self.kinds else "weight"

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Learning rate, weight decay and the like of each parameter group."""
        groups = adam_state(self._state(0))["param_groups"]
        return [{key: value for key, value in group.items() if key != "params"} for group in groups]

    def tensor(self, name: str, kind: Kind = "weight") -> torch.Tensor:
        """A whole trained parameter, or one of its moments, in fp32; a tied name gives the tensor it is tied to.

        Raises:
            CheckpointError: no trained parameter has this name, or the shards are too short for it.
        """
        shape = self.layout.shapes[self._stored(name)]
        return self.elements(name, kind, 0, shape.numel()).view(shape)

    def elements(self, name: str, kind: Kind, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` of a flattened tensor, in fp32; reads only them. Otherwise as `tensor`."""
        name = self._stored(name)
        found = torch.zeros(stop - start, dtype=torch.float32)
        at = 0
        for piece in self.layout.pieces(name):
            first, last = max(start - at, 0), min(stop - at, piece.stop - piece.start)
            if first < last:
                whole = self._source(piece.rank, piece.group, name, kind)
                if whole is None:
                    break  # before the first step: moments begin as zeros
                stored = whole.reshape(-1)[piece.start + first : piece.start + last]
                if len(stored) < last - first:
                    raise CheckpointError(
                        f"{self.folder} is damaged: the shard of rank {piece.rank} ends in {name}; choose another "
                        "checkpoint, or restore its files"
                    )
                found[at + first - start : at + last - start].copy_(stored)
                if whole.is_contiguous():  # else `stored` is a copy, whose pages are not the file's
                    _give_back_pages(stored)
            at += piece.stop - piece.start
        return found

    def step(self, name: str) -> int:
        """Optimizer steps that the moments of a parameter have seen.

        Raises:
            CheckpointError: no trained parameter has this name.
        """
        group, _ = self.layout.places[self._stored(name)]
        return int(adam_state(self._state(0))["state"].get(group, {}).get("step", 0))

    def _stored(self, name: str) -> str:
        name = self.shared.get(name, name)
        if name not in self.parameters:
            raise CheckpointError(f"{self.folder} holds no trained parameter {name}")
        return name

    def _state(self, rank: int) -> dict[str, Any]:
        if rank not in self._states:
            self._states[rank] = _mapped(self._files[rank])["optimizer_state_dict"]
        return self._states[rank]

    def _source(self, rank: int, group: int, name: str, kind: Kind) -> torch.Tensor | None:
        """The stored tensor that holds a rank's elements; None for moments that no step has made yet."""
        state = self._state(rank)
        if kind != "weight":
            moment = adam_state(state)["state"].get(group, {}).get(kind)
            return None if moment is None else moment.detach()
        if self.layout.cut == "nothing":
            masters = [tensor for tensors in state.get("fp32_groups", ()) for tensor in tensors]
            return (masters[group] if masters else self._model["module"][name]).detach()
        key = "fp32_flat_groups" if self.layout.cut == "parameters" else "single_partition_of_fp32_groups"
        return state[key][group].detach()


def _mapped(file: Path) -> dict[str, Any]:
    """The contents of a file of torch.save, tensors not read yet."""
    try:
        with torch.serialization.safe_globals([(_Foreign, name) for name in _FOREIGN]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file} is not a file of a ZeRO checkpoint: {error}\n  fix: restore it, or choose another checkpoint"
        ) from error


def _optimizer_files(folder: Path) -> list[Path]:
    """In the order of the ranks."""
    files = folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")
    return sorted(files, key=lambda file: int(file.name.partition("pp_rank_")[2].partition("_")[0]))


def _uncut_shards(folder: Path, model: dict[str, Any]) -> ZeroShards:
    """A checkpoint of stage 0, whose names of tied parameters share memory."""
    shared: dict[str, str] = {}
    parameters: dict[str, torch.Size] = {}
    first_at: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model["module"].items():
        if name in model["buffer_names"]:
            continue
        stored = first_at.setdefault((tensor.data_ptr(), tensor.shape), name)
        if stored == name:
            parameters[name] = tensor.shape
        else:
            shared[name] = stored
    optimizer = adam_state(model["optimizer"])
    layout = uncut(parameters, int(model["dp_world_size"]), optimizer["param_groups"])
    moments = optimizer["state"]
    for name, (number, _) in layout.places.items():
        if moments.get(number, {}).get("exp_avg", torch.empty(parameters[name])).shape != parameters[name]:
            raise CheckpointError(f"{folder} is not a checkpoint of this trainer: the moments of {name} do not fit it")
    return ZeroShards(folder, 0, layout, parameters, shared, model, [], {0: model["optimizer"]})


def _give_back_pages(piece: torch.Tensor) -> None:
    """Let the system forget the pages of a mapped tensor that was copied; they can be read again."""
    start = piece.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = piece.data_ptr() + piece.numel() * piece.element_size() - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
