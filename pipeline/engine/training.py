"""One rank's run, complete: what the loop and its observers work on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.config.schema import Recipe
from pipeline.engine.phases import Phases
from pipeline.engine.setup import TrainEngine
from pipeline.engine.signals import StopFlag
from pipeline.engine.state import TrainState
from pipeline.stages.base import AnyStage
from shards.load.loader import StepLoader


@dataclass(frozen=True, slots=True)
class Training:
    """Everything a run consists of on this rank; built by `pipeline.engine.prepare`."""

    resolved: ResolvedRecipe
    ranks: dist.Ranks
    stage: AnyStage
    engine: TrainEngine
    loader: StepLoader
    state: TrainState
    """The run's progress; changes with every step."""
    total_steps: int
    stop: StopFlag
    phases: Phases
    """What this rank is doing."""

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def device(self) -> torch.device:
        return self.stage.device
