"""The language model's attention where it generates: the packed keys of training take no cache and no padding.

transformers' own flash keys do both: they unpad a left padded batch, and read the cache
(`modeling_flash_attention_utils._flash_attention_forward`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

log = logging.getLogger(__name__)

_VERSIONS = {"fa2": 2, "fa3": 3, "fa4": 4}


def generation_key(backend: str) -> str:
    """transformers' attention key of a backend that `attention.choose` returned, logged: the same library's where
    transformers can use it, else `sdpa`."""
    version = _VERSIONS.get(backend)
    if version is None:
        key, reason = "sdpa", f"transformers has no key of its own for {backend}" if backend != "sdpa" else ""
    elif not FLASH_ATTENTION_COMPATIBILITY_MATRIX[version]["general_availability_check"]():
        key, reason = "sdpa", f"transformers does not find the library of {backend}"  # it would fetch one from its hub
    else:
        key, reason = f"flash_attention_{version}", ""
    log.info("attention in generation: %s%s", key, f"; {reason}" if reason else "")
    return key


@contextmanager
def switched(llm: PreTrainedModel, key: str) -> Iterator[None]:
    """The model computes its attention by ``key`` inside, and as before afterwards, also after an error."""
    before = llm.config._attn_implementation
    llm.set_attn_implementation(key)
    try:
        yield
    finally:
        llm.set_attn_implementation(before)
