"""All sinks, in the order in which they get a row; adding one is one file and one line here."""

from __future__ import annotations

from pipeline.engine.sinks.base import Sink
from pipeline.engine.sinks.console import Console
from pipeline.engine.sinks.json_lines import JsonLines
from pipeline.engine.sinks.tensorboard import TensorBoard
from pipeline.engine.sinks.wandb import WeightsAndBiases
from pipeline.engine.training import Training

SINKS: tuple[type[Sink], ...] = (JsonLines, TensorBoard, WeightsAndBiases, Console)


def sinks_of(training: Training) -> list[Sink]:
    """The sinks that the recipe asks for on rank 0, none on other ranks."""
    return [kind(training) for kind in SINKS if training.ranks.is_main and kind.enabled(training.recipe)]
