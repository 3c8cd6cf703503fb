"""The environment variables of every rank: to run at all, to agree between hosts, and from the user."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.load import PROJECT_ROOT
from pipeline.config.names import is_secret
from pipeline.errors import RecipeError

# Variables that must be the same on every host and that ssh does not carry.
_CARRIED = (
    "NCCL", "GLOO_", "UCX_", "TORCH_NCCL_", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE", "DEEPSPEED_TIMEOUT", "OMP_NUM_THREADS", "DS_ACCELERATOR", "PYTHON",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def carried(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of this environment that every other host gets as well."""
    return {name: value for name, value in environ.items() if name.startswith(_CARRIED) and not is_secret(name)}


def search_paths(environ: Mapping[str, str]) -> dict[str, str]:
    """Search paths of programs and libraries; always set, so other sources override them."""
    return {name: environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in environ}


def python_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH with the project in front."""
    return os.pathsep.join(part for part in (str(PROJECT_ROOT), environ.get("PYTHONPATH", "")) if part)


def exported(texts: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``--export NAME`` and ``--export NAME=VALUE``.

    Raises:
        RecipeError: an invalid name, a variable that is not set, or a secret.
    """
    variables = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not _NAME.fullmatch(name):
            raise RecipeError(f"--export {text}: {name!r} is not the name of a variable (letters, digits, underscore)")
        if is_secret(name):
            raise RecipeError(f"--export {name}: exported values show in process lists; log in on every host instead")
        if not equals and name not in environ:
            raise RecipeError(f"--export {name}: the variable is not set here; write --export {name}=VALUE")
        variables[name] = value if equals else environ[name]
    return variables


def deepspeed_env_files() -> dict[str, str]:
    """Variables of ``~/.deepspeed_env`` and ``./.deepspeed_env``: a value is everything after its ``=``.

    Raises:
        RecipeError: a file cannot be read, or a line is something else.
    """
    variables: dict[str, str] = {}
    for folder in (Path.home(), Path.cwd()):
        path = folder / ".deepspeed_env"
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
        for number, line in enumerate(text.split("\n"), start=1):
            key, equals, value = line.partition("=")
            if not line.strip():
                continue
            if not equals or not _NAME.fullmatch(key.strip()):
                raise RecipeError(f"{path}:{number}: {line!r} is not of the form NAME=VALUE")
            variables[key.strip()] = value
    return variables


__all__ = ["carried", "deepspeed_env_files", "exported", "python_path", "search_paths"]
