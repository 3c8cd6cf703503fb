"""Recipe sections -> models. Only this file knows how parts are built and put together.

Everything here may be called while a ZeRO-3 `HfDeepSpeedConfig` is alive: parts are built by `from_config` and
`from_pretrained` only (a plain constructor would initialise partitioned, empty tensors), then handed to the model
that holds them. All ranks must call these functions alike.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from pipeline.config.inputs_schema import PoseConfig
from pipeline.config.prompt_schema import PromptsConfig
from pipeline.config.schema import BackboneConfig, DataConfig, ModelConfig, TextEncoderConfig, TinyVit, VisualConfig
from pipeline.errors import RecipeError
from pipeline.models import frame_level
from pipeline.models.clip_level import window_frames
from pipeline.models.fingerprint import export_fingerprint, weights_digest
from pipeline.models.language import embedding_rms, load_language, load_llm, load_tokenizer
from pipeline.models.llava_slt import LlavaSltConfig, LlavaSltForConditionalGeneration
from pipeline.models.pretrained import check_prompt, log_dropout
from pipeline.models.processing import LlavaSltProcessor, ProcessorOptions
from pipeline.models.text_encoder import TextEncoder
from pipeline.models.visual import IMAGE_MEAN, IMAGE_STD, HierarchicalVisualEncoder, VisualEncoderConfig
from shards.media.pose_layouts import LAYOUTS

log = logging.getLogger(__name__)


def build_visual(config: VisualConfig, image_pixels: int, dtype: torch.dtype) -> HierarchicalVisualEncoder:
    """The visual encoder of a recipe: an exported one (`path`) or a new one around a backbone.

    Backbone weights stay trainable as `backbone.train` says (in an export: as it was trained). Raises RecipeError
    for a path that holds something else and for sizes that do not fit together.
    """
    if config.path is not None:
        return _exported_visual(config.path, image_pixels, dtype)
    if config.backbone is None:
        encoder_config = new_encoder_config(config, None, image_pixels)
        built: HierarchicalVisualEncoder = AutoModel.from_config(encoder_config, dtype=dtype)
        return built
    backbone_config, weights = _backbone(config.backbone, image_pixels, dtype)
    encoder_config = new_encoder_config(config, backbone_config, image_pixels)
    normalisation = (list(encoder_config.image_mean), list(encoder_config.image_std))
    encoder_config.backbone_fingerprint = _fingerprint(config.backbone, image_pixels, normalisation)
    loaded = {} if weights is None else {"backbone": _mark_loaded(weights)}
    encoder = AutoModel.from_config(encoder_config, dtype=dtype, **loaded)
    if config.backbone.train == "lora":
        encoder.add_lora(config.backbone.lora_rank, config.backbone.lora_alpha, config.backbone.lora_targets)
    encoder.freeze_backbone()
    if config.backbone.path is not None and encoder.backbone.trains:
        log_dropout(backbone_config, config.backbone.path)
    return encoder


def new_encoder_config(
    config: VisualConfig, backbone_config: PreTrainedConfig | None, image_pixels: int
) -> VisualEncoderConfig:
    """The config of a new encoder around a backbone, whose weights are not read, or without one.

    Raises RecipeError when nothing says what the encoder reads.
    """
    features, pose = config.features, config.pose
    if config.backbone is None and features is None and pose is None:
        raise RecipeError("model.visual: give path (an exported encoder) or backbone, features or pose.")
    backbone = config.backbone or BackboneConfig(train="frozen")
    mean, std = _normalisation(backbone.path)
    clip_stride = 0
    if backbone.kind == "video" and backbone_config is not None:
        clip_stride = backbone.window_stride or window_frames(backbone_config)
    joints = None if pose is None else LAYOUTS[pose.layout]
    return VisualEncoderConfig(
        backbone_config=backbone_config,
        pool=backbone.pool,
        width=config.width,
        dropout=config.dropout,
        max_frames=config.max_frames,
        image_pixels=image_pixels,
        image_mean=mean,
        image_std=std,
        word_layers=config.word.layers,
        word_heads=config.word.heads,
        window_frames=config.word.window_frames,
        stride=config.word.stride,
        sentence_layers=config.sentence.layers,
        sentence_heads=config.sentence.heads,
        backbone_train=backbone.train,
        frames_per_pass=backbone.frames_per_pass,
        centre_clips=config.centre_clips,
        clip_stride=clip_stride,
        backbone_fingerprint="" if features is None else features.fingerprint,
        features_width=0 if features is None else features.width,
        pose_layout="" if pose is None else pose.layout,
        pose_groups=() if joints is None else joints.sizes,
        pose_width=PoseConfig.model_fields["width"].default if pose is None else pose.width,
        pose_fingerprint="" if joints is None else joints.fingerprint,
    )


def build_text_encoder(
    config: TextEncoderConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The frozen text encoder of a recipe, on one device and never partitioned."""
    return TextEncoder.from_config(config, device=device, dtype=dtype)


def word_stride(config: VisualConfig) -> int:
    """Frames per word token of the visual encoder of a recipe. Raises RecipeError as `build_visual`."""
    return config.word.stride if config.path is None else _exported_config(config.path).stride


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    stride: int,
    model: ModelConfig,
    data: DataConfig,
    prompts: PromptsConfig | None = None,
) -> LlavaSltProcessor:
    """The processor that belongs to a LlavaSlt of these parts."""
    options = ProcessorOptions(
        prompt=prompt,
        stride=stride,
        connector_tokens=model.connector.tokens,
        image_pixels=data.image_pixels,
        max_frames=data.max_frames,
        frame_stride=data.frame_stride,
        prompts=prompts or PromptsConfig(),
    )
    return LlavaSltProcessor(tokenizer, options)


def build_llava_slt(
    model: ModelConfig,
    data: DataConfig,
    prompt: str,
    dtype: torch.dtype,
    attention: str | None = None,
    prompts: PromptsConfig | None = None,
) -> tuple[LlavaSltForConditionalGeneration, LlavaSltProcessor]:
    """Visual encoder, new connector and LLM of a recipe as one model, and its processor.

    ``attention`` is the LLM's, as in `load_llm`. New connector weights make its outputs as large as the LLM's
    embeddings. The stage freezes parts. Raises RecipeError when a part is missing or the parts do not fit.
    """
    if model.llm is None or model.visual is None:
        raise RecipeError("model: the connector stage needs both model.llm and model.visual.")
    llm, tokenizer = load_language(model.llm, dtype, attention)
    visual = build_visual(model.visual, data.image_pixels, dtype)
    if data.max_frames > visual.config.max_frames:
        raise RecipeError(
            f"data.max_frames: {data.max_frames} exceeds the visual encoder's max_frames {visual.config.max_frames};"
            " lower it."
        )
    processor = build_processor(tokenizer, prompt, visual.config.stride, model, data, prompts)
    check_prompt(llm, processor.before_ids + processor.after_ids)
    config = LlavaSltConfig(
        visual_config=visual.config,
        text_config=llm.config,
        connector_hidden=model.connector.hidden,
        connector_tokens=model.connector.tokens,
        connector_rms=embedding_rms(llm),
        prompt=prompt,
    )
    token_ids = llm.generation_config  # from here on the whole model's
    llava_slt = AutoModel.from_config(config, dtype=dtype, visual=_mark_loaded(visual), llm=_mark_loaded(llm))
    llava_slt.generation_config = token_ids
    return llava_slt, processor


def _mark_loaded(part: PreTrainedModel) -> PreTrainedModel:
    """Marks a part as initialised, as `from_pretrained` does, so that the model around it keeps its weights."""
    for module in part.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
    return part


def _exported_config(path: str) -> VisualEncoderConfig:
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model.visual.path: cannot read a model from {path!r}: {error}. Give a folder that the contrastive stage"
            " exported."
        ) from error
    if not isinstance(config, VisualEncoderConfig):
        raise RecipeError(
            f"model.visual.path: {path!r} holds a {config.model_type!r} model, not a visual encoder; export the"
            " contrastive stage, or name a frame backbone under model.visual.backbone.path."
        )
    return config


def _exported_visual(path: str, image_pixels: int, dtype: torch.dtype) -> HierarchicalVisualEncoder:
    config = _exported_config(path)
    if config.image_pixels != image_pixels and config.backbone_config is not None:
        raise RecipeError(
            f"data.image_pixels: {image_pixels}, but the encoder in {path!r} was trained on {config.image_pixels};"
            f" set it to {config.image_pixels}."
        )
    if not config.backbone_fingerprint and config.backbone_config is not None:
        config.backbone_fingerprint = export_fingerprint(Path(path), config)  # its backbone comes from this export
    encoder = HierarchicalVisualEncoder.from_pretrained(path, config=config, dtype=dtype)
    encoder.freeze_backbone()
    if encoder.backbone.trains:
        log_dropout(config.backbone_config, path)
    return encoder


def _backbone(
    config: BackboneConfig, image_pixels: int, dtype: torch.dtype
) -> tuple[PreTrainedConfig, PreTrainedModel | None]:
    """The backbone's config, and its weights when they are pretrained."""
    if config.tiny is not None:
        return tiny_vit(config.tiny, image_pixels), None
    if config.path is None:
        raise RecipeError("model.visual.backbone: give path or tiny.")
    try:
        vision = frame_level.vision_config(config.path)
        options = frame_level.backbone_options(vision)
        return vision, AutoModel.from_pretrained(config.path, config=vision, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model.visual.backbone.path: cannot load a vision model from {config.path!r}: {error}. Give a Hugging Face"
            " folder (config.json and safetensors) or a hub id this machine can reach."
        ) from error


def tiny_vit(sizes: TinyVit, image_pixels: int) -> PreTrainedConfig:
    """Config of a random ViT. Raises RecipeError for heads that do not divide its width."""
    if sizes.width % sizes.heads:
        raise RecipeError(
            f"model.visual.backbone.tiny.heads: {sizes.heads} heads do not divide width {sizes.width}; change one."
        )
    return AutoConfig.for_model(
        "vit",
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.feed_forward,
        image_size=image_pixels,
        patch_size=sizes.patch_pixels,
    )


def _fingerprint(config: BackboneConfig, image_pixels: int, normalisation: tuple[list[float], list[float]]) -> str:
    """Identity of the pooled features of a frozen pretrained backbone; empty for any other."""
    if config.path is None or config.train != "frozen":
        return ""
    config_file = cached_file(config.path, "config.json")
    assert config_file is not None  # the backbone has been loaded from there
    identity = [weights_digest(Path(config_file).parent), config.pool, image_pixels, *normalisation]
    if config.kind == "video":
        identity += [config.kind, config.window_stride]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _normalisation(path: str | None) -> tuple[list[float], list[float]]:
    """Image mean and std from the backbone's preprocessor_config.json, else [0, 255] -> [-1, 1]."""
    name = "preprocessor_config.json"
    file = None if path is None else cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    content: dict[str, Any] = {} if file is None else json.loads(Path(file).read_text())
    if path is not None and "image_mean" not in content:
        log.warning("%s has no %s with image_mean; frames are scaled to [-1, 1]", path, name)
    elif path is not None:
        size = content.get("crop_size") or content.get("size")
        log.info(
            "%s: image mean %s and std %s are the backbone's own; its image size %s is not used, the recipe's"
            " data.image_pixels is",
            path,
            content["image_mean"],
            content.get("image_std", IMAGE_STD),
            size,
        )
    return list(content.get("image_mean", IMAGE_MEAN)), list(content.get("image_std", IMAGE_STD))


__all__ = [
    "build_llava_slt",
    "build_processor",
    "build_text_encoder",
    "build_visual",
    "load_llm",
    "load_tokenizer",
    "new_encoder_config",
    "tiny_vit",
]
