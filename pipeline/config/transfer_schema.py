"""Recipe sections that carry learned weights over: from an earlier export, over the steps of a run, and to its end."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.section import Section


class InitFromConfig(Section):
    """Export folders whose weights a new run starts with, by part; `model` where no other field names the part."""

    model: str | None = None
    """Every part that the export and this stage's model both have."""
    visual: str | None = None
    """The visual encoder (contrastive, connector)."""
    connector: str | None = None
    """The connector (connector)."""
    llm: str | None = None
    """The language model (continued_pretraining, connector)."""
    heads: str | None = None
    """Projections, logit scales and text statistics, from `heads.safetensors` (contrastive)."""


class AveragingConfig(Section):
    """A running mean of the trained weights, which is evaluated and exported in their place."""

    kind: Literal["none", "ema"] = "none"
    """`ema`: after every step that is applied, mean = decay * mean + (1 - decay) * weights."""
    decay: float = Field(default=0.999, gt=0, lt=1)
    """Part of the mean that a step keeps: it looks back about 1 / (1 - decay) steps."""
    start: int = Field(default=0, ge=0)
    """The mean follows the weights exactly up to this step."""


class EarlyStopConfig(Section):
    """Ends the run, with exit code 0, when a held-out metric no longer improves."""

    metric: str | None = None
    """Name of a held-out metric (`eval/loss`); None = the one that names the best checkpoint."""
    direction: Literal["min", "max"] | None = None
    """Which way the metric improves; needed with `metric`."""
    patience: int = Field(gt=0)
    """Evaluations in a row without improvement after which the run ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """A change counts as an improvement if it is larger than this."""


__all__ = ["AveragingConfig", "EarlyStopConfig", "InitFromConfig"]
