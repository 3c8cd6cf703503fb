"""The causal language model and its tokenizer: loading them, and parts that other modules use."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.schema import LlmConfig, TinyLlm
from pipeline.errors import RecipeError
from pipeline.losses import ScaledHead
from pipeline.models.attention import KEY_PREFIX, check_model, refuse_masks
from pipeline.models.pretrained import (
    check_vocabulary,
    drop_generation_settings,
    log_dropout,
    log_tokenizer_settings,
    refuse_adapters,
    set_end_ids,
)

log = logging.getLogger(__name__)

_LOOK_UP_ROWS = 4096


def load_tokenizer(config: LlmConfig) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer. Raises RecipeError when there is none or it cannot be used (no eos, no offsets)."""
    source = config.tokenizer or config.path
    if source is None:
        raise RecipeError("model.llm.tokenizer: required with tiny sizes; give a tokenizer folder or hub id.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model.llm.tokenizer: cannot load a tokenizer from {source!r}: {error}. Give a folder with"
            " tokenizer.json, or a hub id this machine can reach."
        ) from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"model.llm.tokenizer: {source!r} defines no eos token, so generation could not stop; set eos_token in its"
            " tokenizer_config.json."
        )
    if not tokenizer.is_fast:
        raise RecipeError(
            f"model.llm.tokenizer: {source!r} is a slow tokenizer without character offsets, which prompt templates"
            " need; convert it to a tokenizer.json."
        )
    return tokenizer


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id that starts every document and prompt: the bos token, if there is one and it is not also eos."""
    bos = tokenizer.bos_token_id
    return None if bos is None or bos == tokenizer.eos_token_id else int(bos)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id for padding; may equal eos, so masks are built from lengths and never from this id."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def load_llm(config: LlmConfig, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The causal LM of a recipe, with pad/eos/bos ids set.

    Args:
        attention: a transformers attention key, None for the model's own default; for packed blocks
            `attention.implementation(attention.choose(...))`.

    Works while a ZeRO-3 `HfDeepSpeedConfig` is alive (weights are then partitioned while they load). Raises
    RecipeError for a path that holds no causal LM.
    """
    if config.tiny is not None:
        return _tiny_llm(config.tiny, load_tokenizer(config), dtype, attention)
    if config.path is None:
        raise RecipeError("model.llm: give path or tiny.")
    refuse_adapters(config.path, "model.llm.path")
    try:
        llm = AutoModelForCausalLM.from_pretrained(
            config.path, dtype=dtype, attn_implementation=attention, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model.llm.path: cannot load a causal language model from {config.path!r}: {error}. Give a Hugging Face"
            " folder (config.json and safetensors) or a hub id this machine can reach."
        ) from error
    if attention is not None and attention.startswith(KEY_PREFIX):
        check_model(llm)
        refuse_masks(llm)
    drop_generation_settings(llm, config.path)
    return llm


def _tiny_llm(
    sizes: TinyLlm, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    if sizes.width % sizes.heads or (sizes.width // sizes.heads) % 2:
        raise RecipeError(
            f"model.llm.tiny.heads: {sizes.heads} heads do not divide width {sizes.width} into an even number of"
            " channels; change one of them."
        )
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.feed_forward,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.max_positions,
        tie_word_embeddings=True,
        bos_token_id=bos_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_id(tokenizer),
    )
    options = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def load_language(
    config: LlmConfig, dtype: torch.dtype, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_llm` and `load_tokenizer` of a recipe, which must fit each other; logs the settings they bring.

    Raises:
        RecipeError: either cannot be used, or the tokenizer makes ids without an embedding.
    """
    tokenizer = load_tokenizer(config)
    llm = load_llm(config, dtype, attention)
    check_vocabulary(llm, tokenizer, "model.llm")
    source = str(config.path or config.tokenizer)
    set_end_ids(llm, tokenizer, source)
    log_dropout(llm.config, source)
    log_tokenizer_settings(tokenizer, source)
    return llm, tokenizer


def decoder(llm: PreTrainedModel) -> nn.Module:
    """The LLM without its output head."""
    return llm.get_decoder()


def output_head(llm: PreTrainedModel) -> nn.Module:
    """Turns the decoder's hidden states into logits, including the scaling that some families apply after."""
    config = llm.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    # Cohere multiplies by logit_scale, Granite divides by logits_scaling
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    head = llm.get_output_embeddings()
    return head if softcap is None and scale == 1.0 else ScaledHead(head, scale, softcap)


def embedding_rms(llm: PreTrainedModel) -> float:
    """Root mean square of the input embeddings of all ids: some models (Gemma 3) scale a row after the look-up, so the
    table alone is too small. All ranks must call: ZeRO-3 gathers the table."""
    embedding: Any = llm.get_input_embeddings()
    weight = embedding.weight
    partitioned = hasattr(weight, "ds_id")  # set by DeepSpeed on parameters it has sharded
    if partitioned:
        weight.all_gather()
    try:
        with torch.no_grad():
            ids_V = torch.arange(weight.shape[0], device=weight.device)
            squares = [embedding(ids_C).double().pow(2).mean(-1) for ids_C in ids_V.split(_LOOK_UP_ROWS)]
        return float(torch.cat(squares).mean().sqrt())
    finally:
        if partitioned:
            weight.partition()
