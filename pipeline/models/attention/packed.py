"""Packed attention inside Hugging Face language models: keys that transformers finds it by.

transformers' own sdpa path is exact for packed `position_ids` only without an attention mask and without a cache;
otherwise it silently leaks between documents. Here document borders are explicit (`documents`), and a call without
them, or with a padding mask, fails.

Each backend has its own transformers attention key, ``slt_varlen_<backend>`` (without "flash" or "sdpa" in it:
transformers treats such names specially). Packed blocks only; load a model with `attention="sdpa"` to
generate or to train on padded batches, or switch with `model.set_attn_implementation("sdpa")`.

Legend: B rows, L positions per row, N = B * L packed positions, H heads, C channels per head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pipeline.dist import SequenceGroup
from pipeline.errors import RecipeError
from pipeline.models.attention.choosing import BACKENDS, choose
from pipeline.models.attention.ragged import Reach, ragged_attention
from pipeline.models.attention.sequence_parallel import to_slices, to_whole_sequences
from pipeline.models.attention.spans import Spans

KEY_PREFIX = "slt_varlen_"


def implementation(backend: str) -> str:
    """The `attn_implementation` of a backend that `choose` returned."""
    return KEY_PREFIX + ("per_document" if backend == "sdpa" else backend)


def head_dim(model: PreTrainedModel) -> int:
    """Channels per head of a language model."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def choose_for(model: PreTrainedModel, name: str, device: torch.device | str) -> str:
    """Sets the packed attention of a language model to what `choose` finds for it, and returns the backend.

    Raises:
        RecipeError: a forced backend cannot run there, or not with the model's channels per head.
    """
    backend = choose(name, device, model.dtype, head_dim(model))
    model.set_attn_implementation(implementation(backend))
    refuse_masks(model)
    return backend


def check_model(model: PreTrainedModel) -> None:
    """Refuses a model that would accept a packed key and then attend across documents, or differently.

    Raises:
        RecipeError: the model has its own attention code, layers that borders and window do not limit, or soft-capping
            or sinks, which no backend computes.
    """
    if not model._supports_attention_backend:
        raise RecipeError(
            f"model.llm: {model.config.model_type!r} does not take its attention from outside, so packed documents"
            " would see each other; use another LLM."
        )
    config = model.config.get_text_config()
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}):
        raise RecipeError(
            f"model.llm: {config.model_type!r} has {', '.join(other)} layers, which would mix packed documents; use an"
            " LLM with full or sliding attention."
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise _uncomputed("attention soft-capping")
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        raise _uncomputed("attention sinks")


def _uncomputed(what: str) -> RecipeError:
    return RecipeError(
        f"model.llm: this model uses {what}, which no packed attention backend here computes; use another LLM."
    )


def register() -> None:
    """Makes the keys known to transformers; done once by importing `pipeline.models`.

    They have no mask builder: before it calls one, transformers looks for packed documents in `position_ids`, which
    waits for the device once per forward. Without one it drops masks, so `refuse_masks` looks out for them.
    """
    for backend in BACKENDS:
        AttentionInterface.register(implementation(backend), _attention_function(backend))


class Packed(TypedDict):
    """Model arguments of packed rows; transformers passes those it does not know on to its attention functions."""

    position_ids: Tensor
    documents: Spans
    """Of the flattened rows."""
    use_cache: bool
    sequence_group: NotRequired[SequenceGroup]
    """The rows are slices of rows: documents are those of the whole, positions those of the slice."""


def packed_kwargs(document_ids_BL: Tensor) -> Packed:
    """Model arguments for packed rows; call it in the collator, on the CPU (it needs Python numbers).

    Args:
        document_ids_BL: an id per position; a new document starts where the id changes, and at every row. Padding at
            the end of a row is a separate document, with any id other than its neighbour's.
    Returns:
        `position_ids` [B, L] that restart per document, the `documents` of the flattened rows, and `use_cache` False.
        Pass no attention_mask with them.
    """
    starts_BL = torch.ones_like(document_ids_BL, dtype=torch.bool)
    starts_BL[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    starts_N = starts_BL.flatten()
    index_N = torch.arange(starts_N.numel(), device=starts_N.device)
    first_N = torch.where(starts_N, index_N, 0).cummax(0).values
    end = index_N.new_tensor([starts_N.numel()])
    lengths = torch.cat((index_N[starts_N], end)).diff()
    return {
        "position_ids": (index_N - first_N).view_as(document_ids_BL),
        "documents": Spans.of(lengths.numpy()),
        "use_cache": False,
    }


def refuse_masks(model: PreTrainedModel) -> None:
    """From now on the model fails with a padding mask while its attention is a packed one: document borders replace
    masks, so that would be a caller's mistake."""
    part = model.get_decoder()
    if _no_mask not in part._forward_pre_hooks.values():
        part.register_forward_pre_hook(_no_mask, with_kwargs=True)


def _no_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    masks = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    if masks.get("attention_mask") is not None and module.config._attn_implementation.startswith(KEY_PREFIX):
        raise ValueError(
            "packed attention got an attention_mask, which it would ignore; pass packed_kwargs(document_ids) alone, or"
            ' load the model with attention="sdpa" for padded batches.'
        )


def _attention_function(backend: str) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """query [B, H, L, C], key and value with their own number of heads -> [B, L, H, C]."""
        _refuse(attention_mask, options)
        group = options.get("sequence_group")
        if group is not None:
            query, key, value = to_whole_sequences(query, key, value, group)
        causal = options.get("is_causal")
        documents = options["documents"]
        reach = Reach(
            documents,
            documents,
            scale=scaling,
            causal=getattr(module, "is_causal", True) if causal is None else causal,
            window=options.get("sliding_window"),
        )
        q_NHC, k_NHC, v_NHC = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        mixed_NHC = ragged_attention(q_NHC, k_NHC, v_NHC, reach, backend)
        mixed_BLHC = mixed_NHC.view(query.shape[0], query.shape[2], *mixed_NHC.shape[1:])
        return mixed_BLHC if group is None else to_slices(mixed_BLHC, group), None

    return attend


def _refuse(attention_mask: Tensor | None, options: dict[str, object]) -> None:
    """Raises for anything that would otherwise be computed wrongly."""
    if attention_mask is not None or options.get("documents") is None:
        raise ValueError(
            "packed attention needs the documents of its rows and no attention_mask; pass"
            ' packed_kwargs(document_ids), or load the model with attention="sdpa" to generate or for padded batches.'
        )
    for option, meaning in (("softcap", "attention soft-capping"), ("s_aux", "attention sinks")):
        if options.get(option) is not None:
            raise _uncomputed(meaning)
    if options.get("dropout"):
        raise RecipeError(
            f"model.llm: attention_dropout {options['dropout']} is not supported with packed documents; set it to 0 in"
            " the model's config.json."
        )
