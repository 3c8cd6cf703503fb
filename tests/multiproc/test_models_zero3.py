"""Models built while ZeRO-3 is configured: partitioned, initialised or loaded like plain ones, and trainable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

LENGTHS = (9, 4)
TEXTS = ["tomorrow it rains", "here"]
DS_CONFIG = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def _recipe(folder: Path, backbone_train: str) -> Any:
    """LLM and frame backbone from saved folders, as in real runs; the connector and the word level are new."""
    from pipeline.config.schema import BackboneConfig, LlmConfig
    from tests.unit.pipeline.models.tiny import model_config, visual_config

    backbone = BackboneConfig.model_validate({"path": str(folder / "vit"), "train": backbone_train, "lora_rank": 2})
    llm = LlmConfig(path=str(folder / "llm"), tokenizer=str(folder))
    return model_config(folder, llm=llm, visual=visual_config(backbone=backbone))


def _build(folder: Path, backbone_train: str = "full") -> Any:
    from pipeline.models.attention import implementation
    from pipeline.models.registry import build_llava_slt
    from tests.unit.pipeline.models.tiny import data_config

    recipe, prompt = _recipe(folder, backbone_train), "signs: {video} sentence:"
    return build_llava_slt(recipe, data_config(), prompt, torch.float32, implementation("sdpa"))


def _rank_main(rank: int, world_size: int, folder: Path, backbone_train: str) -> dict[str, Any]:
    from pipeline import dist

    dist.init()
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    from pipeline.config.schema import TextEncoderConfig
    from pipeline.models.generation_attention import switched
    from pipeline.models.registry import build_text_encoder
    from tests.unit.pipeline.models.tiny import clips

    keep_alive = HfDeepSpeedConfig(DS_CONFIG)
    torch.manual_seed(0)
    model, processor = _build(folder, backbone_train)
    text = build_text_encoder(TextEncoderConfig(kind="llm", path=str(folder / "llm")))
    assert is_deepspeed_zero3_enabled() and text.encode(["here"]).sentence.isfinite().all()
    partitioned = {name for name, p in model.named_parameters() if hasattr(p, "ds_id")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=DS_CONFIG)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    frames_NHWC, lengths_B = clips(*LENGTHS)
    mine = slice(rank, rank + 1)
    part = frames_NHWC.split(list(LENGTHS))[rank]
    row = processor.pack(LENGTHS[mine], TEXTS[mine])
    output = engine(**row, frames=part, frame_lengths=lengths_B[mine])
    engine.backward(output.loss_sum)
    engine.step()
    engine.eval()
    clip: dict[str, Any] = {"frames": part, "frame_lengths": lengths_B[mine]}
    with switched(model.llm, "sdpa"):
        new = model.generate(**processor(LENGTHS[mine]), **clip, max_new_tokens=3 + rank, synced_gpus=True)
    del keep_alive
    return {
        "weights": weights, "loss": float(output.loss_sum.detach()), "partitioned": len(partitioned),
        "total": len(weights), "rms": model.config.connector_rms, "new": new.shape[1],
        "norm": float(engine.get_global_grad_norm()),
    }  # fmt: skip


def _save_parts(folder: Path) -> None:
    from transformers import AutoConfig, AutoModel

    from pipeline.models.language import load_llm
    from tests.unit.pipeline.models.tiny import PIXELS, bpe_tokenizer, llm_config, shake

    bpe_tokenizer(folder)
    llm = load_llm(llm_config(folder), torch.float32)
    shake(llm)
    llm.save_pretrained(folder / "llm")
    bpe_tokenizer(folder / "llm")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vit = AutoModel.from_config(AutoConfig.for_model("vit", image_size=PIXELS, patch_size=16, **sizes))
    shake(vit)
    vit.save_pretrained(folder / "vit")


@pytest.mark.parametrize("backbone_train", ["full", "lora"])
def test_building_and_training_under_zero3(backbone_train: str, tmp_path: Path) -> None:
    _save_parts(tmp_path)
    ranks = run_ranks(_rank_main, 2, tmp_path, backbone_train, timeout=180)
    plain, processor = _build(tmp_path, backbone_train)
    loaded = {name: p for name, p in plain.named_parameters() if name.startswith(("llm.", "visual.backbone.model."))}
    for result in ranks:
        assert result["rms"] == pytest.approx(plain.config.connector_rms, rel=1e-6)
        assert set(result["weights"]) == {name for name, _ in plain.named_parameters()}
        assert all(torch.equal(result["weights"][name], p) for name, p in loaded.items() if "lora_" not in name)
        assert result["norm"] > 0 and 0 < result["new"] <= 4
    assert ranks[0]["partitioned"] > 0.5 * ranks[0]["total"]
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name]), name
    weights = ranks[0]["weights"]
    assert weights["visual.word_level.merge.project.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert weights["visual.sentence_pool.query"].std().item() == pytest.approx(0.02, rel=0.4)
    assert weights["connector.up.weight"].std().item() == pytest.approx(32**-0.5, rel=0.05)
    if backbone_train == "lora":
        assert all(value.abs().sum() == 0 for name, value in weights.items() if "lora_B" in name)
        assert all(value.abs().sum() > 0 for name, value in weights.items() if "lora_A" in name)
    _assert_losses(plain, processor, ranks)


def _assert_losses(plain: Any, processor: Any, ranks: list[dict[str, Any]]) -> None:
    """The unpartitioned model with the same weights has the same loss."""
    from tests.unit.pipeline.models.tiny import clips

    plain.load_state_dict(ranks[0]["weights"], strict=False)
    frames_NHWC, lengths_B = clips(*LENGTHS)
    for rank, part in enumerate(frames_NHWC.split(list(LENGTHS))):
        mine = slice(rank, rank + 1)
        row = processor.pack(LENGTHS[mine], TEXTS[mine])
        loss = plain(**row, frames=part, frame_lengths=lengths_B[mine]).loss_sum
        assert ranks[rank]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
