"""Models in the Hugging Face style. Importing this package registers them, so that `AutoModel` can load an export."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel

from pipeline.models import attention
from pipeline.models.llava_slt import LlavaSltConfig, LlavaSltForConditionalGeneration
from pipeline.models.visual import HierarchicalVisualEncoder, VisualEncoderConfig

AutoConfig.register(VisualEncoderConfig.model_type, VisualEncoderConfig, exist_ok=True)
AutoModel.register(VisualEncoderConfig, HierarchicalVisualEncoder, exist_ok=True)
AutoConfig.register(LlavaSltConfig.model_type, LlavaSltConfig, exist_ok=True)
AutoModel.register(LlavaSltConfig, LlavaSltForConditionalGeneration, exist_ok=True)
attention.register()

__all__ = [
    "HierarchicalVisualEncoder",
    "LlavaSltConfig",
    "LlavaSltForConditionalGeneration",
    "VisualEncoderConfig",
]
