"""Stage name -> class; adding a stage is one file and one line here."""

from __future__ import annotations

from pipeline.stages.base import AnyStage
from pipeline.stages.connector import ConnectorStage
from pipeline.stages.continued_pretraining import ContinuedPretraining
from pipeline.stages.contrastive import Contrastive

STAGES: dict[str, type[AnyStage]] = {stage.name: stage for stage in (ContinuedPretraining, Contrastive, ConnectorStage)}
