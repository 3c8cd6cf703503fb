"""The model of a recipe on torch's meta device: every shape, no data. Reads configs, never weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from pipeline.config.checks import is_remote
from pipeline.config.parts_rules import unreached
from pipeline.config.parts_schema import PartConfig
from pipeline.config.rates import rates_of
from pipeline.config.schema import BackboneConfig, LlmConfig, Recipe, TextEncoderConfig, VisualConfig
from pipeline.config.shard_sets import column_of
from pipeline.config.source import Problem
from pipeline.config.stages import STAGES
from pipeline.errors import RecipeError
from pipeline.memory.stand_in import KEY, attend
from pipeline.memory.zero import Weight
from pipeline.models import frame_level
from pipeline.models.chunked_mlp import chunk_mlps
from pipeline.models.connector import Connector
from pipeline.models.contrastive import ContrastiveModel
from pipeline.models.language import load_llm
from pipeline.models.parts import apply_parts
from pipeline.models.registry import new_encoder_config, tiny_vit
from pipeline.models.text_encoder import without_zero3
from pipeline.models.visual import HierarchicalVisualEncoder, VisualEncoderConfig

UNKNOWN_GLOSSES = 20_000
"""Vocabulary that is assumed where nobody can count it: more than published corpora have."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a stage trains, and what it uses frozen."""

    modules: dict[str, nn.Module]
    """Top-level part -> module on the meta device, its parameters frozen as the stage and the recipe plan."""
    dtype: torch.dtype
    text_encoder: PreTrainedConfig | None = None
    """Of the contrastive stage: it encodes every text before training begins, in float32, then goes."""
    traced: dict[tuple[str, float], tuple[int, ...]] = field(default_factory=dict)
    """(what ran, recomputation) -> its bytes: they grow with rows, so one trace serves every batch size."""

    parts: Mapping[str, PartConfig] = field(default_factory=dict)
    """`train.parts`."""
    lr: float = 1.0
    """`train.optimizer.lr`."""

    def weights(self) -> Iterator[Weight]:
        """Every parameter once (tied ones are one)."""
        named = [(name, p) for part, module in self.modules.items() for name, p in _named(part, module)]
        rates = rates_of([name for name, _ in named], self.parts, self.lr)
        for name, parameter in named:
            part = name.split(".")[0]
            yield Weight(part, parameter.numel(), parameter.dim(), parameter.requires_grad, rates[name])

    @property
    def llm(self) -> Any:
        return self.modules["llm"]

    @property
    def visual(self) -> HierarchicalVisualEncoder:
        found = self.modules.get("visual") or self.modules["model"].visual
        assert isinstance(found, HierarchicalVisualEncoder)
        return found


def parts_of(recipe: Recipe) -> Parts:
    """The recipe's model without weights.

    Raises:
        RecipeError: a folder or hub id holds no config this machine can read.
    """
    AttentionInterface.register(KEY, attend)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    # a rank that plans after it ran out of memory may have ZeRO-3 configured, which would partition these models, too
    with without_zero3(), torch.device("meta"):
        found = {
            "continued_pretraining": _continued_pretraining, "contrastive": _contrastive, "connector": _connector,
            "sequence_tuning": _connector,
        }[recipe.stage](recipe, dtype)  # fmt: skip
        whole = found.modules.get("model") or nn.ModuleDict(found.modules)
        frozen = ("visual", "llm") if STAGES[recipe.stage].translates else ()
        plan = {name: name not in frozen for name in (name.split(".")[0] for name, _ in whole.named_parameters())}
        apply_parts(whole, plan, recipe.train.parts, unreached(recipe))
    for part in found.modules.values():
        part.train(any(parameter.requires_grad for parameter in part.parameters()))
    return replace(found, parts=recipe.train.parts, lr=recipe.train.optimizer.lr)


def _named(part: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names they have in training."""
    prefix = "" if part == "model" else f"{part}."
    return ((f"{prefix}{name}", parameter) for name, parameter in module.named_parameters())


def _continued_pretraining(recipe: Recipe, dtype: torch.dtype) -> Parts:
    assert recipe.model.llm is not None  # checked when the recipe was loaded
    llm: Any = _llm(recipe.model.llm, dtype)
    if recipe.continued_pretraining.mlp_chunk_tokens:
        chunk_mlps(llm, recipe.continued_pretraining.mlp_chunk_tokens)
    return Parts({"llm": llm}, dtype)


def _contrastive(recipe: Recipe, dtype: torch.dtype) -> Parts:
    assert recipe.model.visual is not None and recipe.model.text_encoder is not None
    visual = _visual(recipe.model.visual, recipe.data.image_pixels, dtype)
    text = _text_config(recipe.model.text_encoder)
    width = text.get_text_config().hidden_size
    model = ContrastiveModel(visual, width, recipe.contrastive, gloss_classes(recipe))
    return Parts({"model": model}, dtype, text)


def gloss_classes(recipe: Recipe) -> int:
    """Classes of the gloss head, the blank included; 0 = there is none. Of `UNKNOWN_GLOSSES` if a source cannot be read
    here, or its glosses are in a text column."""
    ctc = recipe.contrastive.ctc
    if not ctc.used:
        return 0
    glosses: set[str] = set()
    for source in recipe.data.train:
        unknown = is_remote(source.shards) or recipe.contrastive.glosses != "gloss"
        column = None if unknown else column_of(source, "gloss")
        if column is None or isinstance(column, Problem):
            return 1 + UNKNOWN_GLOSSES
        glosses.update(gloss for text in column.unique().to_pylist() for gloss in text.split())
    return 1 + len(glosses)


def _connector(recipe: Recipe, dtype: torch.dtype) -> Parts:
    assert recipe.model.visual is not None and recipe.model.llm is not None
    visual = _visual(recipe.model.visual, recipe.data.image_pixels, dtype)
    llm: Any = _llm(recipe.model.llm, dtype)
    embed = llm.config.get_text_config().hidden_size
    connector = Connector(visual.config.width, recipe.model.connector.hidden, embed, 1.0).to(dtype)
    return Parts({"visual": visual, "connector": connector, "llm": llm}, dtype)


def _llm(config: LlmConfig, dtype: torch.dtype) -> nn.Module:
    if config.path is None:
        return load_llm(config, dtype, KEY)
    settings = _config("model.llm.path", config.path, config.trust_remote_code)
    return AutoModelForCausalLM.from_config(
        settings, dtype=dtype, attn_implementation=KEY, trust_remote_code=config.trust_remote_code
    )


def _visual(config: VisualConfig, image_pixels: int, dtype: torch.dtype) -> HierarchicalVisualEncoder:
    if config.path is not None:
        settings = _config("model.visual.path", config.path)
        if not isinstance(settings, VisualEncoderConfig):
            raise RecipeError(
                f"model.visual.path: {config.path!r} holds a {settings.model_type!r} model, not an encoder"
            )
    else:
        vision = None if config.backbone is None else _vision(config.backbone, image_pixels)
        settings = new_encoder_config(config, vision, image_pixels)
    encoder: HierarchicalVisualEncoder = AutoModel.from_config(settings, dtype=dtype)
    if config.backbone is not None and config.backbone.train == "lora":
        encoder.add_lora(config.backbone.lora_rank, config.backbone.lora_alpha, config.backbone.lora_targets)
    encoder.freeze_backbone()
    for module in encoder.backbone.modules():
        if isinstance(found := getattr(module, "config", None), PreTrainedConfig):
            found._attn_implementation = KEY
    return encoder


def _vision(config: BackboneConfig, image_pixels: int) -> PreTrainedConfig:
    if config.tiny is not None:
        return tiny_vit(config.tiny, image_pixels)
    assert config.path is not None  # checked when the recipe was loaded
    _config("model.visual.backbone.path", config.path)
    return frame_level.vision_config(config.path)


def _text_config(config: TextEncoderConfig) -> PreTrainedConfig:
    return _config("model.text_encoder.path", config.path)


def _config(field: str, path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{field}: the memory of {path!r} cannot be planned without its config: {str(error).splitlines()[0]}"
        ) from error


__all__ = ["Parts", "parts_of"]
