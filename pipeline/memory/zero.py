"""Bytes of weights, gradients, optimizer states and buffers per rank: DeepSpeed's arithmetic (ZeRO, arXiv 1910.02054).

Read in DeepSpeed 0.19.8: `runtime/zero/stage_1_and_2.py` (flat groups padded to 2 x ranks, buckets), `stage3.py`
(partitions, flat gradients, one bucket for good), `partition_parameters.py` (a partition is ceil(n / ranks)),
`parameter_offload.py` (persistent parameters), `fp16/unfused_optimizer.py` and `bf16_optimizer.py` (stage 0; bf16 with
fp32 accumulation). `tests/multiproc/test_memory_ranks.py` compares every number here with real ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.rates import Rate
from pipeline.memory.lines import ALWAYS, BACKWARD, ENCODING, GENERATION, STEP, TRAINING, Line

_MOMENTS = "AdamW moments"
_DENSE_GRADIENT_ELEMENTS = 500_000_000  # elements that stage 0 flattens at once to average them


_ONE_RATE = Rate()


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of the model."""

    part: str
    """Top-level part of the model it belongs to."""
    numel: int
    dims: int
    """Those with fewer than two are not decayed, so they are in another optimizer group."""
    trains: bool
    rate: Rate = _ONE_RATE
    """Those of another rate are, too."""


@dataclass(frozen=True, slots=True)
class ZeroSettings:
    """What decides memory in a DeepSpeed configuration, with DeepSpeed's defaults (`runtime/zero/config.py`)."""

    stage: int
    ranks: int
    weight_bytes: int
    """Per weight in forward and backward: 2 in bf16."""
    gradient_bytes: int
    master_bytes: int
    """Per weight in the optimizer; each of the two moments takes as much."""
    bucket: int
    buckets: int
    """2 when communication overlaps with backward."""
    prefetch: int
    persistent: int
    max_live: int
    max_reuse: int
    sub_group: int
    optimizer_on_host: bool
    weights_on_host: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], ranks: int) -> ZeroSettings:
        """Settings of a complete configuration (`ResolvedRecipe.ds_config`)."""
        zero, bf16 = config["zero_optimization"], config["bf16"]
        stage, weight_bytes = int(zero["stage"]), 2 if bf16["enabled"] else 4
        accumulation = (config.get("data_types") or {}).get("grad_accum_dtype")
        overlap = zero.get("overlap_comm")
        return cls(
            stage=stage,
            ranks=ranks,
            weight_bytes=weight_bytes,
            gradient_bytes={"fp32": 4, "bf16": 2, None: weight_bytes}[accumulation],
            master_bytes=2 if bf16["enabled"] and bf16.get("bf16_master_weights_and_grads") else 4,
            bucket=int(zero.get("reduce_bucket_size", 500_000_000)) if zero.get("contiguous_gradients", True) else 0,
            buckets=2 if stage in (1, 2) and overlap else 1,
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
            persistent=int(zero.get("stage3_param_persistence_threshold", 100_000)),
            max_live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
            max_reuse=int(zero.get("stage3_max_reuse_distance", 1_000_000_000)),
            sub_group=int(zero.get("sub_group_size", 1_000_000_000)),
            optimizer_on_host=_on_host(zero, "offload_optimizer"),
            weights_on_host=_on_host(zero, "offload_param"),
        )


def _on_host(zero: Mapping[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"


def state_lines(weights: Iterable[Weight], settings: ZeroSettings, averages: bool = False) -> list[Line]:
    """Everything about a model's weights that one rank keeps on its device.

    ``averages``: also their mean over the steps (`train.averaging`), which is kept as each of Adam's moments is.
    """
    kept = list(weights)
    rule: Callable[[list[Weight], ZeroSettings], Iterator[Line]] = {
        0: _unsharded, 1: _flat_groups, 2: _flat_groups, 3: _partitions
    }[settings.stage]  # fmt: skip
    lines = [line for line in rule(kept, settings) if line.bytes]
    moments = [line for line in lines if averages and line.item == _MOMENTS]
    return lines + [
        replace(
            line, item="mean of the weights", bytes=line.bytes // 2, rule="as one of the two moments",
            fields=("train.averaging.kind",),
        )
        for line in moments
    ]  # fmt: skip


def _trained(weights: list[Weight]) -> int:
    return sum(weight.numel for weight in weights if weight.trains)


def _frozen(weights: list[Weight]) -> int:
    return sum(weight.numel for weight in weights if not weight.trains)


def _groups(weights: list[Weight]) -> list[list[int]]:
    """Sizes of the trained weights by optimizer group, as `engine.setup.parameter_groups` forms them."""
    sizes: dict[tuple[Rate, bool], list[int]] = {}
    for weight in (weight for weight in weights if weight.trains):
        for decayed in (True, False):
            sizes.setdefault((weight.rate, decayed), [])
        sizes[weight.rate, weight.dims >= 2].append(weight.numel)
    return [group for group in sizes.values() if group]


def _unsharded(weights: list[Weight], z: ZeroSettings) -> Iterator[Line]:
    trained, parts = _trained(weights), "every rank keeps all of them"
    yield Line("weights, trained", trained * z.weight_bytes, parts)
    yield Line("weights, frozen", _frozen(weights) * z.weight_bytes, parts)
    yield Line("gradients", trained * z.weight_bytes, parts, TRAINING, ("deepspeed.base",))
    if z.weight_bytes == 2:
        yield Line("fp32 master weights", trained * 4, parts, ALWAYS, ("deepspeed.base",))
        yield Line("fp32 gradients of the step", trained * 4, parts, frozenset({STEP}), ("deepspeed.base",))
    yield Line(_MOMENTS, trained * 8, "two fp32 numbers per trained weight", ALWAYS, ("deepspeed.base",))
    bucket = min(trained, _DENSE_GRADIENT_ELEMENTS) * z.weight_bytes
    if z.ranks > 1:
        yield Line("communication", bucket, "gradients flattened to be averaged", frozenset({BACKWARD}))


def _flat_groups(weights: list[Weight], z: ZeroSettings) -> Iterator[Line]:
    """Stages 1 and 2: one flat buffer of weights per optimizer group, of which each rank updates an equal part."""
    trained, unit = _trained(weights), 2 * z.ranks
    flat = sum(-(-sum(sizes) // unit) * unit for sizes in _groups(weights))
    owned = flat // z.ranks
    base, buckets = ("deepspeed.base",), ("deepspeed.overrides.zero_optimization.reduce_bucket_size",)
    part = f"of which a rank owns 1/{z.ranks}"
    yield Line("weights, trained", flat * z.weight_bytes, "on every rank, flat, padded to 2 x ranks per group")
    yield Line("weights, frozen", _frozen(weights) * z.weight_bytes, "on every rank", ALWAYS, base)
    accumulated, where = trained, "all, until the last micro-batch"
    if z.stage == 2:
        whole = z.gradient_bytes == z.weight_bytes
        accumulated = _touched(weights, z.ranks) if whole else owned
        where = f"every tensor {part}" if whole else part
    if z.stage == 1 and z.gradient_bytes > z.weight_bytes and not z.optimizer_on_host:
        yield Line("fp32 gradients", flat * 4, "accumulated in fp32 on every rank (bf16 optimizer)", ALWAYS, base)
    elif not (z.stage == 2 and z.optimizer_on_host):
        yield Line("gradients", accumulated * z.gradient_bytes, where, TRAINING, base)
    if z.bucket:
        size = z.bucket * z.weight_bytes * z.buckets
        rule = f"reduce_bucket_size x {z.buckets} (overlap_comm)" if z.buckets > 1 else "reduce_bucket_size"
        yield Line("reduction buckets", size, rule, frozenset({BACKWARD}), buckets)
    if z.optimizer_on_host:
        return
    yield Line(_master(z), owned * z.master_bytes, part, ALWAYS, base)
    yield Line(_MOMENTS, owned * 2 * z.master_bytes, f"two numbers, {part}", ALWAYS, base)
    rule = "the owned gradients in the optimizer's precision, one group at a time"
    largest = max((-(-sum(sizes) // unit) * 2 for sizes in _groups(weights)), default=0)
    yield Line("gradients of the step", largest * z.master_bytes, rule, frozenset({STEP}), base)


def _touched(weights: list[Weight], ranks: int) -> int:
    """Elements of the tensors that overlap a rank's part of the flat groups, for the rank with most: stage 2 keeps
    their gradients whole."""
    most, unit = [0] * ranks, 2 * ranks
    for sizes in _groups(weights):
        owned, end = -(-sum(sizes) // unit) * 2, 0
        for size in sizes:
            start, end = end, end + size
            for rank in range(start // owned, (end - 1) // owned + 1):
                most[rank] += size
    return max(most)


def _partitions(weights: list[Weight], z: ZeroSettings) -> Iterator[Line]:
    """Stage 3: each tensor is cut into equal parts; small ones stay whole besides."""

    def part(weight: Weight) -> int:
        return -(-weight.numel // z.ranks)

    owned = sum(part(weight) for weight in weights if weight.trains)
    frozen = sum(part(weight) for weight in weights if not weight.trains)
    whole = sum(part(weight) * z.ranks for weight in weights if weight.numel <= z.persistent)
    base, rule = ("deepspeed.base",), f"1/{z.ranks} of every tensor, rounded up"
    if not z.weights_on_host:
        yield Line("weights, trained", owned * z.weight_bytes, rule)
        yield Line("weights, frozen", frozen * z.weight_bytes, rule, ALWAYS, base)
    name = "stage3_param_persistence_threshold"
    yield Line(
        "weights kept whole", whole * z.weight_bytes, f"tensors of at most {z.persistent} elements", ALWAYS,
        (f"deepspeed.overrides.zero_optimization.{name}",),
    )  # fmt: skip
    yield gathered(weights, z)
    if not z.optimizer_on_host:
        yield Line("gradients", owned * z.gradient_bytes, "one flat buffer for the owned parts", ALWAYS, base)
        yield Line(_master(z), owned * z.master_bytes, rule, ALWAYS, base)
        yield Line(_MOMENTS, owned * 2 * z.master_bytes, "two numbers per owned weight", ALWAYS, base)
        step = min(owned, z.sub_group) * z.master_bytes
        yield Line(
            "gradients of the step", step, "at most sub_group_size of the owned parts", frozenset({STEP}),
            ("deepspeed.overrides.zero_optimization.sub_group_size",),
        )  # fmt: skip
    bucket = ("deepspeed.overrides.zero_optimization.reduce_bucket_size",)
    yield Line("reduction bucket", z.bucket * z.weight_bytes, "reduce_bucket_size, for good", ALWAYS, bucket)


def gathered(weights: Iterable[Weight], z: ZeroSettings) -> Line:
    """Whole tensors on the device at once under stage 3, when backward begins.

    A tensor stays gathered after forward if backward needs it again within `stage3_max_reuse_distance` elements: those
    of the last half of that distance. `stage3_max_live_parameters` bounds them, the prefetch bucket comes on top.
    """
    sizes = [weight.numel for weight in weights if weight.numel > z.persistent]
    kept = min(sum(sizes), max(max(sizes, default=0), min(z.max_live, z.max_reuse // 2)) + z.prefetch)
    return Line(
        "weights gathered", kept * z.weight_bytes,
        "whole tensors in use: half of stage3_max_reuse_distance and the prefetch bucket",
        frozenset({ENCODING, BACKWARD, GENERATION}),
        ("deepspeed.overrides.zero_optimization.stage3_max_reuse_distance",),
    )  # fmt: skip


def _master(z: ZeroSettings) -> str:
    return "bf16 master weights" if z.master_bytes == 2 else "fp32 master weights"


__all__ = ["Weight", "ZeroSettings", "gathered", "state_lines"]
