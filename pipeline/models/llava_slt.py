"""LLaVA-SLT: hierarchical visual encoder -> connector -> causal LM (arXiv 2412.16524), as one Hugging Face model.

Legend: B samples, L text positions (prompt, video placeholders, answer), N packed frames, T frames, S word tokens,
M packed visual tokens, D visual width, E LLM embedding width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from pipeline.config.schema import ConnectorConfig, ConnectorStageConfig
from pipeline.errors import DataError
from pipeline.losses import Criterion, TokenLoss
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.connector import Connector, ConnectorLinear
from pipeline.models.language import decoder, output_head
from pipeline.models.lora import add_described
from pipeline.models.packed_row import PackedAnswers
from pipeline.models.streams import Inputs
from pipeline.models.visual import HierarchicalVisualEncoder, VisualEncoderConfig

VIDEO_TOKEN_ID = -200
"""Placeholder id of one visual token. Outside every vocabulary on purpose (LLaVA, arXiv 2304.08485, does the same):
the frozen LLM is never resized, and ids are masked before the embedding lookup."""


_CONNECTOR = ConnectorConfig()


class LlavaSltConfig(PreTrainedConfig):
    """Everything needed to rebuild the model without the recipe. Its defaults are the recipe's.

    Args:
        visual_config, text_config: nested configs of the encoder and the LLM.
        connector_hidden: hidden width of the MLP.
        connector_tokens: word | frame; which level of the encoder the LLM reads.
        connector_rms: RMS of the outputs of new connector weights, normally that of the LLM's embedding table.
        prompt: template around the visual tokens, with `{video}` once.
        video_token_id: placeholder id in `input_ids`.
        loss_chunk_tokens: labelled positions whose logits exist at once.
        adapters: adapters present in the weights outside the encoder, as `pipeline.models.lora.described`.
    """

    model_type = "llava_slt"
    sub_configs = {"visual_config": VisualEncoderConfig, "text_config": AutoConfig}  # noqa: RUF012

    visual_config: Any = None
    text_config: Any = None
    connector_hidden: int = _CONNECTOR.hidden
    connector_tokens: str = _CONNECTOR.tokens
    connector_rms: float = 0.02
    prompt: str = ConnectorStageConfig().prompt
    video_token_id: int = VIDEO_TOKEN_ID
    loss_chunk_tokens: int = 1024
    adapters: Any = ()
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.visual_config, dict):
            self.visual_config = VisualEncoderConfig(**self.visual_config)
        elif self.visual_config is None:
            self.visual_config = VisualEncoderConfig()
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        elif self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        # copies, because the base class resets the attention choice of every nested config it is given
        self.visual_config, self.text_config = copy.deepcopy(self.visual_config), copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)

    def visual_tokens(self, frames: int) -> int:
        """Placeholders a clip of ``frames`` frames takes in the prompt."""
        return self.visual_config.word_count(frames) if self.connector_tokens == "word" else frames


@dataclass
class LlavaSltOutput(ModelOutput):
    """Of a packed row `loss_sum` (float32 scalar) over its answer tokens, or the criterion's value; otherwise `logits`
    [B, L, V]."""

    loss_sum: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None


class LlavaSltForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Video and prompt -> spoken-language text. Sub-modules: `visual`, `connector`, `llm`.

    Build it with `pipeline.models.registry.build_llava_slt` or `from_pretrained`. A fully frozen part runs without a
    graph (visual) or passes gradients through (llm); see `forward`.
    """

    config_class = LlavaSltConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: LlavaSltConfig,
        visual: HierarchicalVisualEncoder | None = None,
        llm: PreTrainedModel | None = None,
    ) -> None:
        """``visual`` and ``llm``: loaded parts to use instead of new ones from the nested configs."""
        super().__init__(config)
        self.visual = AutoModel.from_config(config.visual_config) if visual is None else visual
        self.llm = AutoModelForCausalLM.from_config(config.text_config) if llm is None else llm
        # `generate` gets this model's settings only, not the LLM's own, which older folders keep in config.json
        self.llm.generation_config = GenerationConfig()
        config.visual_config, config.text_config = self.visual.config, self.llm.config
        self.connector = Connector(
            config.visual_config.width,
            config.connector_hidden,
            config.text_config.get_text_config().hidden_size,
            config.connector_rms,
        )
        add_described(self, config.adapters)
        self.token_loss = TokenLoss(config.loss_chunk_tokens)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ConnectorLinear):
            module.init_weights()

    def train(self, mode: bool = True) -> LlavaSltForConditionalGeneration:
        """As `nn.Module.train`, but fully frozen parts stay in eval mode: no dropout in what never learns.

        A frozen LLM with gradient checkpointing is an exception: transformers checkpoints layers in train mode only, so
        its layers, but nothing inside them, are in train mode (`checkpoint_in_eval`).
        """
        super().train(mode)
        if mode and not _trains(self.visual):
            self.visual.eval()
        if mode and not _trains(self.llm):
            checkpoint_in_eval(self.llm)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return decoder(self.llm)

    def encode_video(
        self, frames: Inputs, frame_lengths: Tensor | None = None, layout: ClipLayout | None = None
    ) -> tuple[Tensor, Tensor]:
        """Visual tokens in the LLM's embedding space, packed [M, E] in sample order, and how many each sample has [B].

        No graph is built for the encoder if none of its parameters needs a gradient.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.visual)):
            output = self.visual(frames, frame_lengths, layout, sentences=False)
        if self.config.connector_tokens == "word":
            return self.connector(output.words_MD), output.layout.word_lengths_B
        return self.connector(output.frames_ND), output.layout.frame_lengths_B

    def embed_inputs(
        self,
        input_ids: Tensor,
        frames: Inputs | None,
        frame_lengths: Tensor | None,
        layout: ClipLayout | None = None,
    ) -> Tensor:
        """Text embeddings [B, L, E] with the visual tokens written over the placeholders.

        Raises:
            DataError: a sample's placeholders and visual tokens differ in number.
        """
        is_video_BL = input_ids == self.config.video_token_id
        embeds_BLE = self.get_input_embeddings()(input_ids.masked_fill(is_video_BL, 0))
        if frames is None:
            if bool(is_video_BL.any()):
                raise DataError(
                    "input_ids hold video placeholders but no frames were given",
                    where="LlavaSlt",
                    fix="pass frames and frame_lengths, or a prompt without {video}",
                )
            return embeds_BLE
        video_ME, count_B = self.encode_video(frames, frame_lengths, layout)
        placeholders_B = is_video_BL.sum(1)
        if placeholders_B.shape != count_B.shape or not torch.equal(placeholders_B, count_B):
            raise DataError(
                f"the prompt holds {placeholders_B.tolist()} video placeholders per sample, the encoder gives"
                f" {count_B.tolist()} {self.config.connector_tokens} tokens",
                where="LlavaSlt",
                fix="build the batch with the processor saved beside this model, once per sample and in its order",
            )
        return embeds_BLE.masked_scatter(is_video_BL[..., None], video_ME.to(embeds_BLE.dtype))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        frames: Inputs | None = None,
        frame_lengths: Tensor | None = None,
        layout: ClipLayout | None = None,
        answers: PackedAnswers | None = None,
        criterion: Criterion | None = None,
        **kwargs: Any,
    ) -> LlavaSltOutput:
        """Logits, or with ``answers`` the summed loss of a packed row.

        Args:
            input_ids: [B, L] with `config.video_token_id` where visual tokens go; of a packed row as its collator
                made them.
            attention_mask: [B, L], 1 = real; none for a packed row.
            frames: what the visual encoder reads, all samples' frames one after another.
            frame_lengths: [B], frames per sample.
            layout: of these frames (`ClipLayout`), instead of their lengths.
            answers: borders and places of a packed row. The LLM's attention must be a packed one
                (`pipeline.models.attention.implementation`).
            criterion: makes the loss of a packed row from the log probabilities of its answer tokens, instead of their
                negative sum (`pipeline.losses.token_criterion`).
            kwargs: transformers' own, passed on to the LLM (`position_ids`, `past_key_values`, `use_cache`,
                `logits_to_keep`).

        Under ZeRO-3 every rank must take the same path: either all pass frames or none, and all pass answers or none.
        """
        if answers is not None:
            assert frames is not None  # a packed row without video would have no connector to train
            video_ME, _ = self.encode_video(frames, frame_lengths, layout)
            hidden_ND = self._packed_states(input_ids, video_ME, answers)
            head = output_head(self.llm)
            return LlavaSltOutput(
                loss_sum=self.token_loss(hidden_ND, answers["targets_N"], head=head, criterion=criterion)
            )
        embeds_BLE = self.embed_inputs(input_ids, frames, frame_lengths, layout)
        result = self.llm(inputs_embeds=embeds_BLE, attention_mask=attention_mask, **kwargs)
        return LlavaSltOutput(logits=result.logits, past_key_values=result.past_key_values)

    def _packed_states(self, ids_BL: Tensor, video_ME: Tensor, answers: PackedAnswers) -> Tensor:
        """Hidden states [N, E] that predict the answer tokens of a packed row. Nothing waits for the device."""
        places_M = answers["visual_positions_M"]
        if "visual_tokens_M" in answers:
            video_ME = video_ME.index_select(0, answers["visual_tokens_M"])
        if len(video_ME) != len(places_M):
            raise DataError(
                f"the packed row has places for {len(places_M)} visual tokens, the encoder gives {len(video_ME)}"
                f" {self.config.connector_tokens} tokens",
                where="LlavaSlt",
                fix="pack the row with the processor saved beside this model, for the very clips passed as frames",
            )
        text_LE = self.get_input_embeddings()(ids_BL).flatten(0, 1)
        embeds_BLE = text_LE.index_copy(0, places_M, video_ME.to(text_LE.dtype))[None]
        states_LE = self.get_decoder()(inputs_embeds=embeds_BLE, **answers["packed"]).last_hidden_state.flatten(0, 1)
        return states_LE.index_select(0, answers["label_positions_N"])

    @torch.no_grad()
    def generate(  # type: ignore[override]  # video enters by name; the rest is GenerationMixin's
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        frames: Inputs | None = None,
        frame_lengths: Tensor | None = None,
        layout: ClipLayout | None = None,
        generation_config: GenerationConfig | None = None,
        copies: int = 1,
        **options: Any,
    ) -> Tensor:
        """Translates; returns the new tokens only, [B * copies * num_return_sequences, new].

        The encoder runs once, before decoding. Prompts of unequal length are left padded with their
        ``attention_mask``. ``copies``: translations of each sample, side by side. ``options`` are transformers' own and
        go to the LLM's `generate` (`num_beams`, `max_new_tokens`, `synced_gpus`, ...).
        """
        embeds_BLE = self.embed_inputs(input_ids, frames, frame_lengths, layout)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if copies > 1:
            embeds_BLE, attention_mask = (rows.repeat_interleave(copies, 0) for rows in (embeds_BLE, attention_mask))
        settings = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        rest = settings.update(**options)
        llm: Any = self.llm
        return llm.generate(inputs_embeds=embeds_BLE, attention_mask=attention_mask, generation_config=settings, **rest)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def checkpoint_in_eval(module: nn.Module) -> None:
    """Eval mode for a frozen part that still uses gradient checkpointing: saving memory changes no number.

    transformers recomputes a layer only if it is in train mode. So the layer is in train mode when called, and in
    eval mode while it computes, both in the first pass and in the recomputation.
    """
    module.eval()
    layers: list[Any] = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    for layer in layers:
        if layer.gradient_checkpointing:
            layer.training = True
            if not isinstance(layer._gradient_checkpointing_func, _CheckpointInEval):
                layer._gradient_checkpointing_func = _CheckpointInEval(layer._gradient_checkpointing_func, layer)


class _CheckpointInEval:
    """A layer's checkpoint function that runs the layer in eval mode while the layer is frozen."""

    def __init__(self, checkpoint: Callable[..., Any], layer: nn.Module) -> None:
        self.checkpoint, self.layer = checkpoint, layer

    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        return self.checkpoint(partial(self.run, forward), *args)

    def run(self, forward: Callable[..., Any], *args: Any) -> Any:
        was_training, self.layer.training = self.layer.training, False
        try:
            return forward(*args)
        finally:
            self.layer.training = was_training
