"""What a pretrained part brings besides weights: checks its limits, drops or logs its own settings.

The recipe decides a run. A folder from elsewhere also holds generation settings, dropout, tokenizer flags and tables
of fixed size; none of them may act silently.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import RecipeError
from shards.text_tokens import TextTokens

log = logging.getLogger(__name__)

ADAPTER_FOLDER = "llm_adapter"
"""Of the language model's adapters in an export that keeps them."""

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_OF_NO_EFFECT = ("transformers_version", "_from_model_config")
_STATED_LIMITS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"
)  # fmt: skip
_TOKENIZER_FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "strip_accents")
_CASE_AND_ACCENTS = "ÄÉš"


def refuse_adapters(path: str, setting: str) -> None:
    """An export that keeps its adapters apart holds the weights from before it was trained.

    Raises:
        RecipeError: the folder is one.
    """
    if (Path(path) / ADAPTER_FOLDER).is_dir():
        raise RecipeError(
            f"{setting}: {path!r} keeps its adapters apart from the weights ({ADAPTER_FOLDER}), which alone are those"
            " from before it was trained; export the run again with --lora merge"
        )


def drop_generation_settings(llm: PreTrainedModel, source: str) -> None:
    """Keep only the token ids of the LLM's generation config; the log names what else it held.

    `generate` fills in whatever the caller did not set from there, so a minimal length or a list of suppressed tokens
    in a pretrained folder would change translations and the choice of the best checkpoint.
    """
    config = llm.generation_config
    if config is None:
        return
    held = config.to_diff_dict()
    dropped = {name: value for name, value in held.items() if name not in (*_IDS, *_OF_NO_EFFECT)}
    if dropped:
        log.info("%s: generation settings dropped (the recipe decides): %s", source, _listed(dropped))
    llm.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in _IDS})


def set_end_ids(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Put every id that ends an answer into the LLM's generation config, the tokenizer's eos first; the log names the
    others, which a folder lists for chats (Llama 3, Qwen, Gemma).

    An id counts if it is a control token, or listed together with the tokenizer's eos. Any other is an ordinary word:
    some configs hold their library's default.
    """
    eos = int(tokenizer.eos_token_id)
    tokens: dict[Any, str] = {at: token for token, at in tokenizer.get_vocab().items()}
    controls = TextTokens(tokenizer).controls
    ends, words = [eos], list[int]()
    for held in (llm.generation_config, llm.config.get_text_config()):
        stated = getattr(held, "eos_token_id", None)
        listed = stated if isinstance(stated, list) else [stated]
        for at in (at for at in listed if isinstance(at, int) and at in tokens and at not in (*ends, *words)):
            (ends if at in controls or eos in listed else words).append(at)
    if len(ends) > 1:
        log.info("%s: answers end at %s too", source, ", ".join(f"{tokens[at]!r} ({at})" for at in ends[1:]))
    if words:
        log.info(
            "%s: listed as eos, but ordinary words of the tokenizer: %s", source, ", ".join(tokens[at] for at in words)
        )
    llm.generation_config = llm.generation_config or GenerationConfig()
    llm.generation_config.eos_token_id = ends if len(ends) > 1 else eos


def log_dropout(config: PreTrainedConfig, source: str) -> None:
    """Log the dropout that a part brings; it acts although no recipe sets it."""
    held = config.get_text_config().to_dict()
    dropout = {
        name: value
        for name, value in held.items()
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float) and value > 0
    }
    if dropout:
        log.info("%s: its own dropout acts while it trains: %s", source, _listed(dropout))


def log_tokenizer_settings(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Log what a tokenizer's own settings change when it encodes or decodes."""
    flags, backend = tokenizer.init_kwargs, getattr(tokenizer, "backend_tokenizer", None)
    shown = {name: flags[name] for name in _TOKENIZER_FLAGS if flags.get(name) is not None}
    if backend is not None and backend.normalizer is not None:
        kept = unicodedata.normalize("NFC", backend.normalizer.normalize_str(_CASE_AND_ACCENTS)).strip(" \u2581")
        shown |= {"normalizer": f"{_CASE_AND_ACCENTS} -> {kept}"} if kept != _CASE_AND_ACCENTS else {}
    if getattr(getattr(backend, "decoder", None), "cleanup", False):
        shown["decoder.cleanup"] = True  # spaces before punctuation go
    if shown:
        log.info("%s: its own tokenizer settings: %s", source, _listed(shown))


def _listed(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()))


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: str) -> None:
    """Every id that can occur needs a row of the embedding table; more rows are fine.

    Texts never make control tokens, so one beyond the table (Gemma 3's image token with its text models) is only
    logged, unless it begins, ends or pads a sequence.

    Raises:
        RecipeError: the table is smaller.
    """
    table: Any = model.get_input_embeddings()
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    idle = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special and at not in used}
    vocabulary = tokenizer.get_vocab()
    rows, ids = int(table.num_embeddings), max(set(vocabulary.values()) - idle) + 1
    if beyond := sorted(token for token, at in vocabulary.items() if at in idle and at >= rows):
        log.warning(
            "%s: control tokens without an embedding, not to be used in a prompt: %s", setting, ", ".join(beyond)
        )
    if rows < ids:
        raise RecipeError(
            f"{setting}: the model's embedding table has {rows} rows, its tokenizer makes {ids} ids. Use the tokenizer"
            " that belongs to the model, or enlarge the table (`resize_token_embeddings` in transformers)."
        )


def check_prompt(model: PreTrainedModel, ids: list[int]) -> None:
    """The prompt's tokens need embeddings, too.

    Raises:
        RecipeError: it holds a control token that the model does not know.
    """
    table: Any = model.get_input_embeddings()
    rows = int(table.num_embeddings)
    if ids and max(ids) >= rows:
        raise RecipeError(
            f"connector.prompt: holds the token with id {max(ids)}, but the embedding table of model.llm has {rows}"
            " rows; leave that control token out of the prompt."
        )


def position_limit(model: nn.Module) -> int | None:
    """Longest input of a model with a table of positions; None if positions are computed (rotary)."""
    limits = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or not _is_position_table(name):
            continue
        # RoBERTa counts from the id after padding; OPT and BART keep two extra rows in front
        offset = int(getattr(module, "offset", 0)) or (0 if module.padding_idx is None else module.padding_idx + 1)
        limits.append(int(module.num_embeddings) - offset)
    # GPT-J, CodeGen and CTRL keep sines and cosines up to a fixed length
    limits += [len(table) for name, table in model.named_buffers() if table.dim() == 2 and _is_position_table(name)]
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", "") == "mpt":  # every call makes a table of biases of this length
        limits.append(int(config.max_seq_len))
    return min(limits) if limits else None


def _is_position_table(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last in ("wpe", "embed_positions", "positions_embed", "pos_encoding") or "position_emb" in last


def _stated_limit(config: PreTrainedConfig) -> int | None:
    """The length that a config states, under the first of the usual names."""
    stated = (getattr(config, name, None) for name in _STATED_LIMITS)
    return next((length for length in stated if isinstance(length, int) and length > 0), None)


def check_positions(model: PreTrainedModel, needed: int, what: str, part: str, fix: str) -> None:
    """A table of positions must hold the longest input; if positions are computed, the log names an input longer than
    the model was trained on.

    Args:
        needed: positions the recipe asks for.
        what: the setting that asks, for the message.
        part: the setting that named the model.
        fix: what to change.

    Raises:
        RecipeError: the table is shorter.
    """
    limit = position_limit(model)
    if limit is not None and needed > limit:
        raise RecipeError(f"{what}: {needed} positions, but the model of {part} has a table of {limit}; {fix}.")
    trained = _stated_limit(model.config.get_text_config())
    if limit is None and trained is not None and needed > trained:
        log.warning("%s: %d positions, more than the %d that the model of %s was made for", what, needed, trained, part)


__all__ = [
    "ADAPTER_FOLDER",
    "check_positions",
    "check_prompt",
    "check_vocabulary",
    "drop_generation_settings",
    "log_dropout",
    "log_tokenizer_settings",
    "position_limit",
    "refuse_adapters",
    "set_end_ids",
]
