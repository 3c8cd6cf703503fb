"""The class of a stage by its name; `pipeline.config.stages` lists them."""

from __future__ import annotations

import importlib

from pipeline.config.stages import STAGES
from pipeline.stages.base import AnyStage


def stage_class(name: str) -> type[AnyStage]:
    """The class of a listed stage. Imports only this stage."""
    module, _, attribute = STAGES[name].implementation.partition(":")
    stage: type[AnyStage] = getattr(importlib.import_module(module), attribute)
    return stage
