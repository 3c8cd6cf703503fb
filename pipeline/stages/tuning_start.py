"""The model that sequence-level tuning started from, computed with the weights that have stayed as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.errors import RecipeError
from pipeline.models.connector import Connector
from pipeline.models.exported import Export, init_folders
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.lora import without_adapters
from pipeline.stages.data import StageContext


def check_start(trainable: Sequence[str]) -> None:
    """Refuse to look back at a start that only a second model could compute.

    Raises:
        RecipeError: something trains besides the connector and adapters of the LLM, which can be left out.
    """
    others = [n for n in trainable if not n.startswith("connector.") and not (n.startswith("llm.") and ".lora_" in n)]
    if others:
        raise RecipeError(
            f"sequence_tuning.kl_weight: {len(others)} parameters train besides the connector, first {others[0]}."
            " The start is computed with the first connector and without adapters of the LLM, so nothing else may"
            " change. Set kl_weight to 0, or freeze the part in train.parts (llm: mode lora)."
        )


def source_of_connector(model: ModelConfig) -> Path:
    """The export that tuning starts from. Raises RecipeError for one without a connector."""
    folder = init_folders(model).get("connector")
    if folder is None:
        raise RecipeError(
            f"model.init_from.model: {model.init_from.model} holds no connector, and a new one writes nothing that a"
            " reward could tell apart; name an export of stage 3 (or of this stage)"
        )
    return folder


def start_connector(context: StageContext, module: LlavaSltForConditionalGeneration) -> Connector:
    """The connector of `model.init_from`, frozen, also in a run that goes on; no rank holds only a part of it."""
    export, config = Export(source_of_connector(context.recipe.model)), module.config
    embed = config.text_config.get_text_config().hidden_size
    connector = Connector(config.visual_config.width, config.connector_hidden, embed, config.connector_rms)
    tensors = {name.removeprefix("connector."): export.tensor(name) for name in export.names("connector")}
    connector.load_state_dict(tensors)
    return connector.to(context.device, context.dtype).requires_grad_(False).eval()


@contextmanager
def as_at_start(module: LlavaSltForConditionalGeneration, connector: Connector) -> Iterator[None]:
    """Inside, the model computes with this connector and without adapters of the LLM."""
    own = module.connector
    module.connector = connector
    try:
        with without_adapters(module.llm):
            yield
    finally:
        module.connector = own


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


__all__ = ["as_at_start", "check_start", "evaluating", "source_of_connector", "start_connector"]
