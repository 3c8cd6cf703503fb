"""Recipe settings that all timed runs have in common, and which fields a recipe has."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.rows import Probe


def run_sets(probe: Probe, run_dir: Path, zero: int, steps: int) -> list[str]:
    """One process, bf16, no evaluation, no checkpoint."""
    base, overrides = f"zero{zero}", "{}"
    if probe.dry:
        base, overrides = "cpu", f"{{zero_optimization: {{stage: {zero}}}}}"
    return [
        f"run_dir={run_dir}", "data.eval=[]", "train.world_sizes=[1]", "train.precision=bf16", f"train.steps={steps}",
        "train.log_every_steps=10", "train.eval_every_steps=0", "train.tensorboard=false",
        "train.optimizer.warmup_steps=1", "train.checkpoint={every_steps: 0, keep: 1}",
        f"deepspeed.base={base}", f"deepspeed.overrides={overrides}",
    ]  # fmt: skip


def has_field(path: str) -> bool:
    """Whether the recipe has a setting, named like `model.kernels`."""
    from pydantic import BaseModel

    from pipeline.config.schema import Recipe

    section: type[BaseModel] = Recipe
    *sections, last = path.split(".")
    for name in sections:
        annotation = section.model_fields[name].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return last in section.model_fields
