"""The language model's attention where it generates: the packed keys of training take no cache and no padding.

transformers' own flash keys do both: they unpad a left padded batch, and read the cache
(`modeling_flash_attention_utils._flash_attention_forward`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from pipeline.models.attention import choose, head_dim

log = logging.getLogger(__name__)

_VERSIONS = {"fa2": 2, "fa3": 3, "fa4": 4}


def generation_key(llm: PreTrainedModel, backend: str) -> str:
    """transformers' attention key for a backend that `attention.choose` returned, logged: the same library's where
    transformers can use it with this model, else `sdpa`."""
    version = _VERSIONS.get(backend)
    reason = ""
    if version is None:
        reason = "" if backend == "sdpa" else f"transformers has no key of its own for {backend}"
    elif not llm._supports_flash_attn:
        reason = f"{llm.config.model_type} does not take {backend} from transformers"
    elif not FLASH_ATTENTION_COMPATIBILITY_MATRIX[version]["general_availability_check"]():
        reason = f"transformers does not find the library of {backend}"  # it would fetch one from its hub
    key = "sdpa" if version is None or reason else f"flash_attention_{version}"
    log.info("attention in generation: %s%s", key, f"; {reason}" if reason else "")
    return key


def choose_for_generation(llm: PreTrainedModel, device: torch.device | str) -> None:
    """The best attention for an LLM that only generates, on the device where it runs; `sdpa`, which every export opens
    with, stays where nothing better is there for this model."""
    key = generation_key(llm, choose("auto", device, llm.dtype, head_dim(llm), "the language model"))
    if key != "sdpa":
        llm.set_attn_implementation(key)


@contextmanager
def switched(llm: PreTrainedModel, key: str) -> Iterator[None]:
    """The model computes its attention by ``key`` inside, and as before afterwards, also after an error."""
    before = llm.config._attn_implementation
    llm.set_attn_implementation(key)
    try:
        yield
    finally:
        llm.set_attn_implementation(before)
