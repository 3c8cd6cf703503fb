"""An export is compared with what the live model said, and refused when it says something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import CheckpointError
from pipeline.export import verify
from pipeline.export.mapped import MappedFiles
from pipeline.models.registry import build_visual, load_llm
from pipeline.stages.continued_pretraining import ContinuedPretraining
from pipeline.stages.video import probe_frames
from tests.unit.pipeline.export.runs import finished_run, recipe_of
from tests.unit.pipeline.models.tiny import PIXELS, bpe_tokenizer, llm_config, shake, visual_config

LIVE = torch.tensor([[10.0, -2.0, 4.0]])


def compare(tmp_path: Path, patch: pytest.MonkeyPatch, exported: torch.Tensor, precision: str) -> dict[str, float]:
    resolved = recipe_of("continued_pretraining", f"train.precision={precision}")
    asked = []

    def outputs(folder: Path, probe: object, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        asked.append((folder, dtype))
        return {"logits": exported}

    patch.setattr(ContinuedPretraining, "exported", outputs)
    checkpoint = finished_run(tmp_path, resolved, probe={"logits": LIVE})
    found = verify.verify_export(tmp_path, checkpoint, resolved)
    assert asked == [(tmp_path, torch.bfloat16 if precision == "bf16" else torch.float32)]
    return found


@pytest.mark.parametrize(("precision", "off"), [("fp32", 9e-4), ("bf16", 0.4)])
def test_rounding_is_allowed_relative_to_the_largest_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, off: float
) -> None:
    shift = torch.tensor([0.0, off, 0.0])
    assert compare(tmp_path, monkeypatch, LIVE + shift, precision) == {"logits": pytest.approx(off, rel=1e-3)}


@pytest.mark.parametrize(
    ("precision", "off", "words"),
    [
        ("fp32", 2e-3, r"logits by 0\.002 \(allowed 0\.001\)"),
        ("bf16", 0.75, r"logits by 0\.75 \(allowed 0\.5\)"),
        ("fp32", float("nan"), r"logits by nan \(allowed 0\.001\)"),
    ],
)
def test_a_model_that_differs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, off: float, words: str
) -> None:
    message = rf"the exported model differs from the live one: {words}; the export of .*step-000005 was discarded"
    with pytest.raises(CheckpointError, match=message):
        compare(tmp_path, monkeypatch, LIVE + torch.tensor([0.0, 0.0, off]), precision)


def test_a_real_language_model(tmp_path: Path) -> None:
    bpe_tokenizer(tmp_path / "tokenizer")
    model = load_llm(llm_config(tmp_path / "tokenizer"), torch.float32).eval()
    model.save_pretrained(tmp_path / "export")
    ids_BL = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probe = {"input_ids": ids_BL, "logits": model(input_ids=ids_BL).logits}
    resolved = recipe_of("continued_pretraining", "train.precision=fp32")
    checkpoint = finished_run(tmp_path, resolved, probe=probe)
    assert verify.verify_export(tmp_path / "export", checkpoint, resolved)["logits"] < 1e-5
    shake(model, std=1e-2)
    model.save_pretrained(tmp_path / "export")
    with pytest.raises(CheckpointError, match="the exported model differs from the live one: logits by"):
        verify.verify_export(tmp_path / "export", checkpoint, resolved)


def test_a_real_encoder_with_its_heads(tmp_path: Path) -> None:
    encoder = build_visual(visual_config(), PIXELS, torch.float32).eval()
    shake(encoder)
    encoder.save_pretrained(tmp_path / "export")
    heads = {f"{name}_head.weight": torch.randn(6, 32) for name in ("sentence", "word")}
    save_file(heads, tmp_path / "export" / "heads.safetensors")
    frames_NHWC, lengths_B = probe_frames(PIXELS, torch.device("cpu"))
    with torch.no_grad():
        live = encoder(frames_NHWC, lengths_B)
    probe = {
        "frames": frames_NHWC, "frame_lengths": lengths_B,
        "video_BE": live.sentence_BD @ heads["sentence_head.weight"].T,
        "words_BSE": live.layout.pad_words(live.words_MD)[0] @ heads["word_head.weight"].T,
    }  # fmt: skip
    resolved = recipe_of("contrastive", "train.precision=fp32")
    checkpoint = finished_run(tmp_path, resolved, probe=probe)
    found = verify.verify_export(tmp_path / "export", checkpoint, resolved)
    assert found.keys() == {"video_BE", "words_BSE"} and max(found.values()) < 1e-4
    save_file({**heads, "word_head.weight": heads["word_head.weight"] + 0.1}, tmp_path / "export" / "heads.safetensors")
    with pytest.raises(CheckpointError, match="differs from the live one: words_BSE by"):
        verify.verify_export(tmp_path / "export", checkpoint, resolved)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_comparison_maps_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """An export holds the run's precision, so nothing is converted when it is loaded."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    bpe_tokenizer(tmp_path / "tokenizer")
    model = load_llm(llm_config(tmp_path / "tokenizer"), dtype).eval()
    model.save_pretrained(tmp_path / "export")
    loaded: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained

    def remember(*arguments: Any, **options: Any) -> Any:
        loaded.append(load(*arguments, **options))
        return loaded[0]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", remember)
    ids_BL = torch.arange(9).view(1, 9)
    with torch.no_grad():
        probe = {"input_ids": ids_BL, "logits": model(input_ids=ids_BL).logits.float()}
    resolved = recipe_of("continued_pretraining", f"train.precision={precision}")
    verify.verify_export(tmp_path / "export", finished_run(tmp_path, resolved, probe=probe), resolved)
    ranges = MappedFiles([tmp_path / "export"]).ranges
    for name, parameter in loaded[0].named_parameters():
        assert any(begin <= parameter.data_ptr() < end for begin, end in ranges), f"{name} was copied"
