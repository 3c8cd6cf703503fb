"""Rows of metrics to Weights & Biases, if `train.wandb_project` is set."""

from __future__ import annotations

from pipeline.config.schema import Recipe
from pipeline.engine.sinks.base import Metrics, Sink
from pipeline.engine.training import Training
from pipeline.errors import RecipeError


class WeightsAndBiases(Sink):
    """A W&B run under the recipe's name. Raises RecipeError if the library is not installed."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        try:
            import wandb
        except ImportError as error:
            raise RecipeError(
                "train.wandb_project is set but wandb is not installed; pip install 'llava-slt[wandb]' or remove the"
                " field"
            ) from error
        recipe = training.recipe
        self._run = wandb.init(
            project=recipe.train.wandb_project, name=recipe.name, dir=str(training.run_dir), resume="allow"
        )

    @classmethod
    def enabled(cls, recipe: Recipe) -> bool:
        return recipe.train.wandb_project is not None

    def write(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def end(self) -> None:
        self._run.finish()
