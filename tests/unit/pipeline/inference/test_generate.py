"""What a translation asks of the LLM is told before the first model call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config.schema import LlmConfig, ModelConfig
from pipeline.errors import EXIT_USER, RecipeError
from pipeline.evaluate.run import EvaluateOptions, evaluate_export
from pipeline.inference.generate import GenerationOptions
from pipeline.inference.translate import Translator
from pipeline.models.registry import build_llava_slt
from shards.schema import VideoFile
from tests.unit.pipeline.models.test_pretrained import gpt2
from tests.unit.pipeline.models.tiny import data_config, visual_config


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose LLM has a table of 64 positions."""
    folder = tmp_path_factory.mktemp("learned")
    model = ModelConfig(llm=LlmConfig(path=str(gpt2(folder / "llm"))), visual=visual_config())
    live, processor = build_llava_slt(model, data_config(), "signs: {video} text:", torch.float32)
    live.save_pretrained(folder / "export")
    processor.save_pretrained(folder / "export")
    return folder / "export"


def test_more_new_tokens_than_positions(learned: Path, shard_dir: Path, tmp_path: Path) -> None:
    translator = Translator.from_export(learned)
    room = 64 - len(translator.processor.prompt_ids(64))
    said = (
        rf"--set max_new_tokens={room + 1} behind a prompt of {64 - room} tokens \(at 64 frames\): 65 positions,"
        r" but the model of .* has a table of 64; lower max_new_tokens"
    )
    options = GenerationOptions(max_new_tokens=room + 1)
    with pytest.raises(RecipeError, match=said) as told:
        evaluate_export(learned, [shard_dir], tmp_path, EvaluateOptions(generation=options))
    assert told.value.exit_code == EXIT_USER
    with pytest.raises(RecipeError, match=said):
        translator.translate([VideoFile(tmp_path / "unread.mp4")], options)
    fits = EvaluateOptions(generation=GenerationOptions(max_new_tokens=room), max_samples=1)
    assert evaluate_export(learned, [shard_dir], tmp_path, fits) is not None
