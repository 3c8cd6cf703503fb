"""The DeepSpeed configuration of a run: a base from ds_configs/, completed by the recipe, nothing left to chance.

DeepSpeed 0.19.8 silently takes an unfilled "auto" for a default or for off, and silently ignores a misspelt top-level
key. Therefore every key is checked against the lists below (a test compares them with the installed DeepSpeed),
keys the recipe owns cannot be set elsewhere, and no "auto" is left when the configuration reaches DeepSpeed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.names import nearest
from pipeline.config.schema import AUTO, Recipe
from pipeline.config.source import Problem
from pipeline.config.widths import widest
from pipeline.errors import RecipeError

log = logging.getLogger(__name__)

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

ACCEPTED = frozenset({
    "activation_checkpointing", "aio", "checkpoint", "comms_logger", "communication_data_type", "compile", "data_types",
    "disable_allgather", "disable_python_gc", "dump_state", "flops_profiler", "gradient_predivide_factor", "log_level",
    "memory_breakdown", "prescale_gradients", "steps_per_print", "timers", "wall_clock_breakdown", "zero_optimization",
})  # fmt: skip
"""Top-level keys a base or an override may set."""

OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.optimizer.clip_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.optimizer.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "tensorboard": "train.tensorboard",
    "wandb": "train.wandb_project",
}
"""Top-level keys the recipe decides, and the setting that does."""

REFUSED = {
    "zero_allow_untested_optimizer": "the pipeline sets it: the optimizer is torch.optim.AdamW",
    "zero_force_ds_cpu_optimizer": "the pipeline sets it: the optimizer is torch.optim.AdamW",
    "gradient_allreduce_op": "the loss is normalised for gradients averaged over ranks",
    "managed_gradient_accumulation": "accumulation is the trainer's",
    "dataloader_drop_last": "shards are read by the project's own loader",
    "seq_parallel_communication_data_type": "train.sequence_parallel is the recipe's, and DeepSpeed is not told of it",
    "tensor_parallel": "tensor parallelism is not part of this trainer",
    "expert_parallel": "expert parallelism is not part of this trainer",
    "use_data_before_expert_parallelism": "expert parallelism is not part of this trainer",
    "pipeline": "pipeline parallelism is not part of this trainer",
    "hybrid_engine": "generation runs on the exported model",
    "weight_quantization": "it belongs to inference",
    "vocabulary_size": "it belongs to the autotuner",
    "autotuning": "batch sizes are recipe values",
    "data_efficiency": "the order of samples is computed from the shard index",
    "datastates_ckpt": "checkpoints are written by pipeline/engine/saving",
    "csv_monitor": "metrics are written to <run_dir>/metrics.jsonl",
    "comet": "metrics are written to <run_dir>/metrics.jsonl",
    "bfloat16": 'it is an old name of "bf16", which train.precision decides',
    **dict.fromkeys(
        ("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
         "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
        "DeepSpeed has removed it",
    ),
}  # fmt: skip
"""Top-level keys DeepSpeed knows but a run of this project must not set, and why."""

BF16_KEYS = frozenset({
    "enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states",
})  # fmt: skip

ZERO_KEYS = frozenset({
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients",
    "enable_sanity_checks", "ignore_unused_parameters", "leaf_module", "load_from_fp32_weights",
    "log_trace_cache_warnings", "memory_efficient_linear", "offload_optimizer", "offload_param", "overlap_comm",
    "override_module_apply",
    "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "stage", "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params", "sub_group_size", "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
})  # fmt: skip
"""Keys of zero_optimization a base or an override may set."""

ZERO_REFUSED = {
    "compute_grad_norm": "whether a step is applied, and how far gradients are clipped, is decided from the norm",
    "cpu_offload": "deprecated; write offload_optimizer",
    "cpu_offload_param": "deprecated; write offload_param",
    "cpu_offload_use_pin_memory": "deprecated; write pin_memory inside offload_param and offload_optimizer",
    "elastic_checkpoint": "deprecated; checkpoints are resharded with `slt ckpt reshard`",
    "legacy_stage1": "deprecated",
    "stage3_gather_fp16_weights_on_model_save": "deprecated; write stage3_gather_16bit_weights_on_model_save",
    "save_muon_momentum_buffer_in_memory": "the optimizer is torch.optim.AdamW",
    "zenflow": "it needs DeepSpeed's own optimizer, and runs use torch.optim.AdamW",
}

OFFLOAD_PARAM_KEYS = frozenset({"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"})
OFFLOAD_OPTIMIZER_KEYS = frozenset({
    "device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "ratio",
    "super_offload", "cpuadam_cores_perc",
})  # fmt: skip

_NEVER_PRINT_STEPS = 1_000_000_000  # the trainer logs; DeepSpeed's own line every 10 steps would only repeat it
_WIDTH_UNKNOWN = 4096  # hidden size of 7-8B causal LMs, for recipes whose models are not on this machine


def ds_config(recipe: Recipe, world_size: int, accumulation_steps: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration, ready for `deepspeed.initialize(config=...)`.

    Raises:
        RecipeError: the base or the overrides hold an unknown or owned key, or an "auto" no rule fills.
    """
    config, problems = _assemble(recipe, world_size, accumulation_steps)
    if problems:
        raise RecipeError("the DeepSpeed configuration cannot be used\n" + "\n".join(f"  {p.text}" for p in problems))
    return config


def deepspeed_problems(recipe: Recipe) -> list[Problem]:
    """Everything wrong with the base and the overrides; does not depend on the world size."""
    return _assemble(recipe, 1, 1)[1]


def owned_values(recipe: Recipe, world_size: int, accumulation_steps: int) -> dict[str, Any]:
    """The keys the recipe decides, except `bf16`, whose sub-keys a base may tune.

    DeepSpeed counts every rank as data-parallel, also ranks that share a sequence: told of them, 0.19.8 averages
    gradients over the ranks in ZeRO-3 and over the groups in ZeRO-1 and 2, and records them as tensor-parallel in
    checkpoints. The loss is normalised for the mean over all ranks instead.
    """
    return {
        "train_batch_size": recipe.train.micro_batch * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": recipe.train.optimizer.clip_norm,
        "zero_allow_untested_optimizer": True,
    }


def _assemble(recipe: Recipe, world_size: int, accumulation_steps: int) -> tuple[dict[str, Any], list[Problem]]:
    try:
        # overrides are checked beside the base with most keys as long as none is chosen
        base, path = _read_base("zero3" if recipe.deepspeed.base == AUTO else recipe.deepspeed.base)
    except RecipeError as error:
        return {}, [Problem(str(error), ("deepspeed.base",))]
    overrides = json.loads(json.dumps(recipe.deepspeed.overrides))
    problems = [*_key_problems(base, str(path), "deepspeed.base")]
    problems += _key_problems(overrides, "deepspeed.overrides", "deepspeed.overrides")
    config = _deep_merge(base, overrides)
    zero = config.get("zero_optimization")
    if isinstance(zero, dict):
        problems += _zero_problems(zero, str(path))
        problems += _overflow_problems(config.get("bf16"), zero.get("stage"))
    else:
        problems.append(Problem(f"{path}: zero_optimization must be a section with a stage", ("deepspeed.base",)))
    problems += _compile_problems(recipe, config)
    bf16 = config.pop("bf16", {})
    for key in OWNED:
        config.pop(key, None)
    config.update(owned_values(recipe, world_size, accumulation_steps))
    config["bf16"] = {**(bf16 if isinstance(bf16, dict) else {}), "enabled": recipe.train.precision == "bf16"}
    config.setdefault("steps_per_print", _NEVER_PRINT_STEPS)
    config.setdefault("wall_clock_breakdown", False)
    # on by default, and then it waits for the device twice per micro-batch
    config.setdefault("timers", {"throughput": {"enabled": False}})
    if recipe.train.compile == "deepcompile" and isinstance(config.get("compile", {}), dict):
        config.setdefault("compile", {})["deepcompile"] = True
    if _offloads(zero, "offload_optimizer"):
        # without this, DeepSpeed refuses a client optimizer with ZeRO-Offload
        config["zero_force_ds_cpu_optimizer"] = False
    filled, left = _fill_auto(config, "", _bucket_sizes(recipe))
    problems += [
        Problem(f'{name} is "auto" in {path} but no rule fills it; write a value', ("deepspeed.base",)) for name in left
    ]
    return filled, problems


def _read_base(name: str) -> tuple[dict[str, Any], Path]:
    """A base by name (``zero3``) or by path (``my/zero3.json``)."""
    path = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    known = sorted(file.stem for file in DS_CONFIGS.glob("*.json"))
    if not path.is_file():
        hint = nearest(name, known) if not name.endswith(".json") else ""
        raise RecipeError(
            f"deepspeed.base={name!r} names no file{hint} (known: auto, {', '.join(known)}, or a path to .json)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} is not a usable JSON file: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path} must hold one JSON object")
    return config, path


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return result


def _key_problems(config: Mapping[str, Any], label: str, field: str) -> list[Problem]:
    problems = []
    for key, value in config.items():
        fields = (f"{field}.{key}" if field.endswith("overrides") else field,)
        if key in ACCEPTED or (key in OWNED and value == "auto"):
            continue
        if key == "bf16" and isinstance(value, dict):
            problems += [Problem(text, fields) for text in _bf16_problems(value, label)]
        elif key in OWNED:
            problems.append(Problem(f"{label}: {key} is decided by the recipe; set {OWNED[key]} instead", fields))
        elif key in REFUSED:
            problems.append(Problem(f"{label}: {key} cannot be set: {REFUSED[key]}", fields))
        else:
            hint = nearest(key, [*ACCEPTED, *OWNED])
            problems.append(Problem(f"{label}: {key} is not a DeepSpeed key{hint}", fields))
    return problems


def _bf16_problems(section: Mapping[str, Any], label: str) -> list[str]:
    texts = []
    if section.get("enabled", "auto") != "auto":
        texts.append(f"{label}: bf16.enabled is decided by the recipe; set train.precision instead")
    for key in section:
        if key not in BF16_KEYS:
            texts.append(f"{label}: bf16.{key} is not a DeepSpeed key{nearest(key, BF16_KEYS)}")
    return texts


def _overflow_problems(bf16: object, stage: object) -> list[Problem]:
    """Stages 1 and 2 notice non-finite gradients by this check alone; without it they reach the weights."""
    if stage in (1, 2) and isinstance(bf16, dict) and bf16.get("check_grad_overflow") is False:
        text = (
            f"bf16.check_grad_overflow=false under ZeRO stage {stage} would put non-finite gradients into the weights"
            " instead of skipping the step; remove it"
        )
        return [Problem(text, ("deepspeed.overrides", "deepspeed.base"))]
    return []


def _zero_problems(zero: Mapping[str, Any], label: str) -> list[Problem]:
    texts = []
    for key in zero:
        if key in ZERO_REFUSED:
            texts.append(f"zero_optimization.{key} cannot be set: {ZERO_REFUSED[key]}")
        elif key not in ZERO_KEYS:
            texts.append(f"zero_optimization.{key} is not a DeepSpeed key{nearest(key, ZERO_KEYS)}")
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        texts.append(f"zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    for name, keys in (("offload_param", OFFLOAD_PARAM_KEYS), ("offload_optimizer", OFFLOAD_OPTIMIZER_KEYS)):
        texts += _offload_problems(zero, name, keys)
    return [Problem(f"{label}: {text}", ("deepspeed.base", "deepspeed.overrides")) for text in texts]


def _offload_problems(zero: Mapping[str, Any], name: str, keys: frozenset[str]) -> list[str]:
    section, stage = zero.get(name), zero.get("stage")
    if section is None:
        return []
    where = f"zero_optimization.{name}"
    if not isinstance(section, dict):
        return [f"{where} must be a section with a device, got {section!r}"]
    texts = [f"{where}.{key} is not a DeepSpeed key{nearest(key, keys)}" for key in section if key not in keys]
    device = section.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        texts.append(f"{where}.device must be none, cpu or nvme, got {device!r}")
    if device == "nvme" and not section.get("nvme_path"):
        texts.append(f"{where}.nvme_path is missing; device nvme needs a folder on that disk")
    if section.get("super_offload"):
        texts.append(f"{where}.super_offload needs DeepSpeed's own optimizer, and runs use torch.optim.AdamW")
    if device != "none" and name == "offload_param" and stage != 3:
        texts.append(f"{where} works with stage 3 only, got stage {stage}")
    if device != "none" and name == "offload_optimizer" and stage == 0:
        texts.append(f"{where} needs a ZeRO stage of 1 or more, got stage 0")
    return texts


def _compile_problems(recipe: Recipe, config: Mapping[str, Any]) -> list[Problem]:
    """What cannot be compiled, or would be compiled to no avail."""
    how, long_text = recipe.train.compile, recipe.continued_pretraining
    zero, section = config.get("zero_optimization"), config.get("compile")
    problems: list[tuple[str, str]] = []
    if not isinstance(section, dict | None):
        problems.append((f"compile must be a section of DeepSpeed's settings, got {section!r}", "deepspeed"))
    elif section is not None and "deepcompile" in section:
        problems.append(("compile.deepcompile is decided by the recipe; set train.compile instead", "deepspeed"))
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if how == "layers" and stage == 3:
        text = "the hooks of ZeRO stage 3 would cut every layer into pieces; take deepspeed.base=zero1 or zero2"
        problems.append((text, "deepspeed.base"))
    if how == "layers" and recipe.model.gradient_checkpointing:
        text = "torch.compile leaves layers that are computed again as they are; set model.gradient_checkpointing=false"
        problems.append((text, "model.gradient_checkpointing"))
    if how == "deepcompile" and recipe.stage != "continued_pretraining":
        problems.append((f"shapes change from batch to batch in the {recipe.stage} stage; set it to none", "stage"))
    if how == "deepcompile" and stage == 0:
        problems.append(("DeepSpeed compiles under ZeRO stages 1 to 3, not 0", "deepspeed.base"))
    if how != "none" and (recipe.train.sequence_parallel > 1 or long_text.mlp_chunk_tokens):
        text = "layers that exchange slices or work in chunks are not compiled; train.sequence_parallel must be 1 and"
        problems.append((f"{text} continued_pretraining.mlp_chunk_tokens 0", "train.sequence_parallel"))
    if how == "deepcompile" and long_text.offload_activations:
        text = "it cannot move activations to host memory by continued_pretraining.offload_activations; set that to"
        problems.append((f"{text} false", "continued_pretraining.offload_activations"))
    return [Problem(f"train.compile={how}: {text}", ("train.compile", field)) for text, field in problems]


def _offloads(zero: object, name: str) -> bool:
    section = zero.get(name) if isinstance(zero, dict) else None
    return isinstance(section, dict) and section.get("device", "none") != "none"


def _bucket_sizes(recipe: Recipe) -> dict[str, int]:
    """Sizes for "auto" in zero_optimization, by the rule of transformers/integrations/deepspeed.py."""
    width = recipe.deepspeed.bucket_width or widest(recipe)
    if width is None:
        log.debug("no config of a model of %s is here; ZeRO buckets follow a width of %d", recipe.name, _WIDTH_UNKNOWN)
        width = _WIDTH_UNKNOWN
    return {
        "zero_optimization.reduce_bucket_size": width * width,
        "zero_optimization.stage3_prefetch_bucket_size": width * width * 9 // 10,
        "zero_optimization.stage3_param_persistence_threshold": 10 * width,
    }


def _fill_auto(node: Any, path: str, values: Mapping[str, int]) -> tuple[Any, list[str]]:
    """Replace each "auto" that a rule knows; also return the paths of the others."""
    left: list[str] = []
    if isinstance(node, dict):
        result = {}
        for key, value in node.items():
            result[key], missing = _fill_auto(value, f"{path}.{key}" if path else key, values)
            left += missing
        return result, left
    if isinstance(node, list):
        pairs = [_fill_auto(value, f"{path}.{number}", values) for number, value in enumerate(node)]
        return [value for value, _ in pairs], [name for _, missing in pairs for name in missing]
    if node == "auto":
        return (values[path], []) if path in values else (node, [path])
    return node, left


def _deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _deep_merge(merged[key], value) if both else value
    return merged


__all__ = ["ACCEPTED", "DS_CONFIGS", "OWNED", "REFUSED", "ZERO_KEYS", "deepspeed_problems", "ds_config", "owned_values"]
