"""Attention over packed documents: one place, chosen once, never across documents.

transformers' own sdpa path is exact for packed `position_ids` only without an attention mask and without a cache;
otherwise it silently leaks between documents. Here document borders are explicit (`cu_seq_lens`), and a call without
them, or with a padding mask, fails.

Each backend has its own transformers attention key, ``slt_varlen_<backend>`` (without "flash" or "sdpa" in it:
transformers treats such names specially). Packed blocks only; load a model with `attention="sdpa"` to
generate or to train on padded batches, or switch with `model.set_attn_implementation("sdpa")`.

Backends, best first: ``fa4`` (flash-attn-4, Hopper and later), ``fa3`` (flash_attn_interface), ``fa2`` (flash-attn),
``torch_varlen`` (FlashAttention-2 inside torch, arXiv 2307.08691), ``sdpa`` (one document at a time; any device and
precision; the reference).

Legend: B rows, L positions per row, N = B * L packed positions, H heads, C channels per head.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from pipeline.dist import SequenceGroup
from pipeline.errors import RecipeError
from pipeline.models.sequence_parallel import to_slices, to_whole_sequences

log = logging.getLogger(__name__)

KEY_PREFIX = "slt_varlen_"
BACKENDS = ("fa4", "fa3", "fa2", "torch_varlen", "sdpa")
HOPPER = (9, 0)
AMPERE = (8, 0)


def choose(name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> str:
    """The backend for packed attention on ``device``, logged with the reason against each better one.

    Args:
        name: a backend, or `auto` for the best that works here.
    Raises:
        RecipeError: a forced backend that does not work here, or an unknown name.
    """
    if name != "auto" and name not in BACKENDS:
        raise RecipeError(f"model.attention: {name!r} is not one of auto, {', '.join(BACKENDS)}.")
    device = torch.device(device)
    if name != "auto":
        if problem := _obstacle(name, device, dtype):
            raise RecipeError(
                f"model.attention: {name} cannot run on this machine: {problem}. Use auto, or install what is missing."
            )
        log.info("packed attention: %s (forced by the recipe)", name)
        return name
    obstacles = {backend: _obstacle(backend, device, dtype) for backend in BACKENDS}
    chosen = next(backend for backend in BACKENDS if obstacles[backend] is None)
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in obstacles.items() if reason)
    log.info("packed attention: %s (auto)%s", chosen, f"; not {reasons}" if reasons else "")
    return chosen


def implementation(backend: str) -> str:
    """The `attn_implementation` of a backend that `choose` returned."""
    return KEY_PREFIX + ("per_document" if backend == "sdpa" else backend)


def check_model(model: PreTrainedModel) -> None:
    """Refuses a model that would accept a packed key and then attend across documents.

    Raises:
        RecipeError: the model has its own attention code, or layers that borders and window do not limit.
    """
    if not model._supports_attention_backend:
        raise RecipeError(
            f"model.llm: {model.config.model_type!r} does not take its attention from outside, so packed documents"
            " would see each other; use another LLM for continued_pretraining."
        )
    config = model.config.get_text_config()
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}):
        raise RecipeError(
            f"model.llm: {config.model_type!r} has {', '.join(other)} layers, which would mix packed documents; use an"
            " LLM with full or sliding attention for continued_pretraining."
        )


def register() -> None:
    """Makes the keys known to transformers; done once by importing `pipeline.models`."""
    for backend in BACKENDS:
        AttentionInterface.register(implementation(backend), _attention_function(backend))
        AttentionMaskInterface.register(implementation(backend), _no_mask)


class Packed(TypedDict):
    """Model arguments of packed rows, under the names that transformers passes to its attention functions."""

    position_ids: Tensor
    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int
    use_cache: bool
    sequence_group: NotRequired[SequenceGroup]
    """The rows are slices of rows: lengths and borders are those of the whole, positions those of the slice."""


def packed_kwargs(document_ids_BL: Tensor) -> Packed:
    """Model arguments for packed rows; call it in the collator, on the CPU (it needs Python numbers).

    Args:
        document_ids_BL: an id per position; a new document starts where the id changes, and at every row. Padding at
            the end of a row is a separate document, with any id other than its neighbour's.
    Returns:
        `position_ids` [B, L] that restart per document, `cu_seq_lens_q` and `cu_seq_lens_k` int32 over the
        flattened rows, `max_length_q` and `max_length_k`, and `use_cache` False. Pass no attention_mask with them.
    """
    starts_BL = torch.ones_like(document_ids_BL, dtype=torch.bool)
    starts_BL[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    starts_N = starts_BL.flatten()
    index_N = torch.arange(starts_N.numel(), device=starts_N.device)
    first_N = torch.where(starts_N, index_N, 0).cummax(0).values
    end = index_N.new_tensor([starts_N.numel()])
    borders = torch.cat((index_N[starts_N], end)).to(torch.int32)
    longest = int(borders.diff().max())
    return {
        "position_ids": (index_N - first_N).view_as(document_ids_BL),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot be used here, or None."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    needed = AMPERE if backend in ("fa2", "torch_varlen") else HOPPER
    if torch.cuda.get_device_capability(device) < needed:
        return f"needs compute capability {needed[0]}.{needed[1]} or newer"
    try:
        _kernel(backend)
    except (ImportError, AttributeError) as error:
        return str(error)
    return None


@cache
def _kernel(backend: str) -> Callable[..., Any]:
    """The varlen function of a library. flash-attn-4 alone makes `flash_attn` an empty namespace package, so each
    is found by the module that really contains it."""
    module, function = {
        "fa4": ("flash_attn.cute", "flash_attn_varlen_func"),
        "fa3": ("flash_attn_interface", "flash_attn_varlen_func"),
        "fa2": ("flash_attn", "flash_attn_varlen_func"),
        "torch_varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    }[backend]
    return getattr(importlib.import_module(module), function)


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Mask builder of the packed keys: document borders replace masks, so a padding mask is a caller's mistake."""
    if attention_mask is not None:
        raise ValueError(
            "packed attention got an attention_mask, which it would ignore; pass packed_kwargs(document_ids) alone, or"
            ' load the model with attention="sdpa" for padded batches.'
        )


@dataclass(frozen=True)
class _Span:
    """Which positions see which: documents between borders, causal or not, at most ``window`` positions back."""

    borders: Tensor
    longest: int
    scale: float | None
    causal: bool
    window: int | None

    @property
    def left_right(self) -> tuple[int, int]:
        """The same as FlashAttention's window_size; -1 is unbounded."""
        if self.window is not None and self.window < self.longest:
            return self.window - 1, 0 if self.causal else self.window - 1
        return -1, 0 if self.causal else -1


def _attention_function(backend: str) -> Callable[..., tuple[Tensor, None]]:
    run = _RUNNERS[backend]

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
        span = _Span(
            borders=options["cu_seq_lens_q"],
            longest=options["max_length_q"],
            scale=scaling,
            causal=getattr(module, "is_causal", True) if causal is None else causal,
            window=options.get("sliding_window"),
        )
        q_NHC, k_NHC, v_NHC = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        mixed_NHC = run(q_NHC, k_NHC, v_NHC, span)
        mixed_BLHC = mixed_NHC.view(query.shape[0], query.shape[2], *mixed_NHC.shape[1:])
        return mixed_BLHC if group is None else to_slices(mixed_BLHC, group), None

    return attend


def _refuse(attention_mask: Tensor | None, options: dict[str, object]) -> None:
    """Raises for anything that would otherwise be computed wrongly."""
    if attention_mask is not None or options.get("cu_seq_lens_q") is None or options.get("max_length_q") is None:
        raise ValueError(
            "packed attention needs cu_seq_lens_q and max_length_q and no attention_mask; pass"
            ' packed_kwargs(document_ids), or load the model with attention="sdpa" to generate or for padded batches.'
        )
    for option, meaning in (("softcap", "attention soft-capping"), ("s_aux", "attention sinks")):
        if options.get(option) is not None:
            raise RecipeError(
                f"model.llm: this model uses {meaning}, which no packed attention backend here computes; use another"
                " LLM for continued_pretraining."
            )
    if options.get("dropout"):
        raise RecipeError(
            f"model.llm: attention_dropout {options['dropout']} is not supported with packed documents; set it to 0 in"
            " the model's config.json."
        )


def _sdpa_documents(q_NHC: Tensor, k_NHC: Tensor, v_NHC: Tensor, span: _Span) -> Tensor:
    mixed = []
    sizes = span.borders.diff().tolist()
    for q, k, v in zip(q_NHC.split(sizes), k_NHC.split(sizes), v_NHC.split(sizes), strict=True):
        q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
        mask = _window_mask(q.shape[2], span, q.device)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=span.causal and mask is None, scale=span.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        mixed.append(out[0].transpose(0, 1))
    return torch.cat(mixed)


def _window_mask(length: int, span: _Span, device: torch.device) -> Tensor | None:
    if span.window is None or span.window >= length:
        return None
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return (back < span.window) & (back >= 0 if span.causal else back > -span.window)


def _torch_varlen(q_NHC: Tensor, k_NHC: Tensor, v_NHC: Tensor, span: _Span) -> Tensor:
    attend, longest = _kernel("torch_varlen"), span.longest
    # torch 2.12 needs an argument for grouped heads, 2.11 does not have it
    grouped = {"enable_gqa": q_NHC.shape[1] != k_NHC.shape[1]} if _takes(attend, "enable_gqa") else {}
    return attend(
        q_NHC, k_NHC, v_NHC, span.borders, span.borders, longest, longest,
        scale=span.scale, window_size=span.left_right, **grouped,
    )  # fmt: skip


def _flash(backend: str) -> Callable[[Tensor, Tensor, Tensor, _Span], Tensor]:
    def run(q_NHC: Tensor, k_NHC: Tensor, v_NHC: Tensor, span: _Span) -> Tensor:
        unbounded = None if backend == "fa4" else -1
        left, right = (unbounded if side == -1 else side for side in span.left_right)
        result = _kernel(backend)(
            q_NHC,
            k_NHC,
            v_NHC,
            cu_seqlens_q=span.borders,
            cu_seqlens_k=span.borders,
            max_seqlen_q=span.longest,
            max_seqlen_k=span.longest,
            softmax_scale=span.scale,
            causal=span.causal,
            window_size=(left, right),
        )
        return result[0] if isinstance(result, tuple) else result  # fa4 and old fa3 return (out, lse)

    return run


@cache
def _takes(function: Callable[..., Any], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


_RUNNERS: dict[str, Callable[[Tensor, Tensor, Tensor, _Span], Tensor]] = {
    "sdpa": _sdpa_documents,
    "torch_varlen": _torch_varlen,
    **{backend: _flash(backend) for backend in ("fa2", "fa3", "fa4")},
}
