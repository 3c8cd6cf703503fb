"""A small sentencepiece tokenizer for the demo's LLM, saved as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SPECIAL: dict[str, Any] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def train_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int) -> Path:
    """Train a byte-pair encoding (arXiv 1808.06226) on ``texts``; complete or absent, reused when it exists.

    Returns:
        ``folder``, loadable with ``AutoTokenizer.from_pretrained``.
    """
    if (folder / "tokenizer_config.json").is_file():
        return folder
    import sentencepiece
    from transformers import LlamaTokenizer

    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(temporary / "tokenizer"),
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    (temporary / "tokenizer_config.json").write_text(json.dumps(SPECIAL), encoding="utf-8")
    (temporary / "tokenizer.model").stat()
    tokenizer = LlamaTokenizer.from_pretrained(temporary, **SPECIAL)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, folder)
    return folder
