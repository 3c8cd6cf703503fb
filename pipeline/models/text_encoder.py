"""The pretrained text encoder videos are aligned with. Always frozen; its outputs are cached (text_cache.py).

Legend: L text tokens, D width of the token features, E width of the sentence feature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as zero3

from pipeline.config.schema import TextEncoderConfig
from pipeline.errors import DataError, RecipeError
from pipeline.models.language import bos_id, decoder
from pipeline.models.pretrained import check_positions, check_vocabulary, log_tokenizer_settings, refuse_adapters
from shards.text_tokens import TextTokens


@dataclass
class TextFeatures:
    """Float32 CPU features of n texts: `tokens` n tensors [L, D], `sentence` [n, E]. Not normalised."""

    tokens: list[Tensor]
    sentence: Tensor


class TextEncoder:
    """Texts -> token and sentence features of a frozen model.

    `hf`: any Hugging Face encoder (of an encoder-decoder, the encoder). The sentence is the mean over all tokens, the
    first (`cls`) or the last token, as the model's authors pooled it.
    `llm`: a causal LM. The sentence is the last text token's state or the mean over the text's own tokens; bos and
    prefix are left out of the mean because the first position of an LLM is an attention sink of huge norm
    (arXiv 2309.17453).

    Token features cover the text's own tokens only, never special or prefix tokens: their last hidden states, or with
    `token_features: embeddings` their input embedding rows. With a byte-level BPE tokenizer a prefix that ends in a
    space (`" "` will do) gives the first word the token it has inside a sentence. Control tokens in a prefix are
    those tokens; a text that spells one gets the ids of its characters (`shards.text_tokens`).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TextEncoderConfig) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.config = tokenizer, config
        self._texts = TextTokens(tokenizer)

    @classmethod
    def from_config(
        cls, config: TextEncoderConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> TextEncoder:
        """Loads the encoder whole onto ``device``, also while ZeRO-3 is configured for the models being trained.

        Raises RecipeError when the path holds no such model or only a tokenizer without offsets.
        """
        if config.kind == "llm" and config.pooling == "cls":
            raise RecipeError(
                "model.text_encoder.pooling: the first token of a causal LM sees nothing else; use mean or last."
            )
        refuse_adapters(config.path, "model.text_encoder.path")
        kind = AutoModel if config.kind == "hf" else AutoModelForCausalLM
        try:
            with without_zero3():
                model = kind.from_pretrained(config.path, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(config.path)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"model.text_encoder.path: cannot load a {config.kind!r} text encoder from {config.path!r}: {error}."
                " Give a Hugging Face folder with model and tokenizer, or a hub id this machine can reach."
            ) from error
        if not tokenizer.is_fast:
            raise RecipeError(
                f"model.text_encoder.path: the tokenizer in {config.path!r} gives no character offsets, which are"
                " needed to leave the prefix out; convert it to a tokenizer.json."
            )
        encoder = cls(model, tokenizer, config)
        table: Any = model.get_input_embeddings().weight
        if config.token_features == "embeddings" and table.shape[1] != encoder.width:
            raise RecipeError(
                f"model.text_encoder.token_features: the embeddings of {config.path!r} are {table.shape[1]} wide, its"
                f" hidden states {encoder.width}; use token_features: hidden."
            )
        check_vocabulary(model, tokenizer, "model.text_encoder.path")
        bos = config.kind == "llm" and bos_id(tokenizer) is not None  # stands in front of the max_tokens
        check_positions(
            model, config.max_tokens + bos,
            "model.text_encoder.max_tokens" + " and the bos token" * bos,
            "model.text_encoder.path", "lower max_tokens",
        )  # fmt: skip
        log_tokenizer_settings(tokenizer, config.path)
        nn.Module.to(model, device)
        return encoder

    @property
    def width(self) -> int:
        """D, the width of both token and sentence features."""
        return int(self.model.config.get_text_config().hidden_size)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over weights, tokenizer and every option that changes the features."""
        digest = hashlib.sha256(json.dumps(self.config.model_dump(exclude={"path"}), sort_keys=True).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 64) -> TextFeatures:
        """Features of ``texts`` in their order; ``batch`` texts per forward, of similar length to save padding.

        Raises:
            DataError: a text without a single token.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        tokens: list[Tensor] = [torch.empty(0)] * len(texts)
        sentence: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            for place, (features, pooled) in zip(places, self._encode([texts[i] for i in places]), strict=True):
                tokens[place], sentence[place] = features, pooled
        return TextFeatures(tokens, torch.stack(sentence))

    def _encode(self, texts: list[str]) -> list[tuple[Tensor, Tensor]]:
        rows = [self._tokenise(text) for text in texts]
        shape = len(rows), max(len(ids) for ids, _ in rows)
        ids_BL = torch.zeros(shape, dtype=torch.long)  # any valid id will do under the mask
        mask_BL, own_BL = torch.zeros_like(ids_BL), torch.zeros(shape, dtype=torch.bool)
        for place, (ids, own) in enumerate(rows):
            ids_BL[place, : len(ids)], mask_BL[place, : len(ids)] = torch.tensor(ids), 1
            own_BL[place, : len(ids)] = torch.tensor(own)
        device = self.model.device
        ids_BL, mask_BL, own_BL = ids_BL.to(device), mask_BL.to(device), own_BL.to(device)
        hidden_BLD = self._hidden(ids_BL, mask_BL).float()
        sentence_BE = self._pool(hidden_BLD, mask_BL, own_BL).cpu()
        features_BLD = hidden_BLD
        if self.config.token_features == "embeddings":
            features_BLD = self.model.get_input_embeddings()(ids_BL).float()
        return [(row[own].cpu(), pooled) for row, own, pooled in zip(features_BLD, own_BL, sentence_BE, strict=True)]

    def _tokenise(self, text: str) -> tuple[list[int], list[bool]]:
        """Ids with special and prefix tokens, and which of them are the text's own."""
        config, llm = self.config, self.config.kind == "llm"
        tokens = self._texts.behind(config.prefix, text, special=not llm, most=config.max_tokens)
        ids, own = tokens.ids, tokens.own
        if llm and (bos := bos_id(self.tokenizer)) is not None:
            ids, own = [bos, *ids], [False, *own]
        if not any(own):
            raise DataError(
                f"the text {text!r} has no token of its own within max_tokens {config.max_tokens}",
                where="text encoder",
                fix="drop empty texts when building shards, or raise model.text_encoder.max_tokens",
            )
        return ids, own

    def _hidden(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        if self.config.kind == "llm":
            model: Any = decoder(self.model)
            return model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
        model = self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model
        return model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state

    def _pool(self, hidden_BLD: Tensor, mask_BL: Tensor, own_BL: Tensor) -> Tensor:
        if self.config.pooling == "cls":
            return hidden_BLD[:, 0]
        if self.config.pooling == "last":
            return hidden_BLD[torch.arange(len(hidden_BLD), device=hidden_BLD.device), mask_BL.sum(1) - 1]
        weight_BL1 = (own_BL if self.config.kind == "llm" else mask_BL)[..., None].float()
        return (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)


@contextmanager
def without_zero3() -> Iterator[None]:
    """Hides a live `HfDeepSpeedConfig` from `from_pretrained`: this model is never wrapped by an engine."""
    reference = zero3._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    zero3.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            zero3.set_hf_deepspeed_config(config)
