"""The hierarchical visual encoder: exact for ragged batches, serialisable, honest about what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from pipeline.config.schema import BackboneConfig, SentenceLevelConfig, TinyVit, VisualConfig, WordLevelConfig
from pipeline.errors import DataError, RecipeError
from pipeline.models import HierarchicalVisualEncoder, VisualEncoderConfig
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.frame_level import new_backbone
from pipeline.models.registry import build_visual
from tests.unit.pipeline.models.tiny import PIXELS, clips, shake, visual_config

LENGTHS = (13, 1, 30, 7, 4)
VIT_SIZES = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": PIXELS, "patch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> HierarchicalVisualEncoder:
    built = build_visual(visual_config(), PIXELS, torch.float32)
    shake(built)
    return built.eval()


def test_output_shapes_and_masks(encoder: HierarchicalVisualEncoder) -> None:
    output = encoder(*clips(*LENGTHS))
    assert output.frames_ND.shape == (55, 32) and output.layout.frame_lengths_B.tolist() == list(LENGTHS)
    assert output.words_MD.shape == (16, 32) and output.layout.word_lengths_B.tolist() == [4, 1, 8, 2, 1]
    assert [encoder.config.word_count(length) for length in LENGTHS] == [4, 1, 8, 2, 1]
    assert output.sentence_BD.shape == (5, 32)
    words_BSD, mask_BS = output.layout.pad_words(output.words_MD)
    frames_BTD = output.layout.pad_frames(output.frames_ND)
    assert words_BSD.shape == (5, 8, 32) and frames_BTD.shape == (5, 30, 32)
    assert torch.equal(words_BSD[mask_BS], output.words_MD) and words_BSD[~mask_BS].abs().sum() == 0
    assert torch.equal(frames_BTD[2], output.frames_ND[14:44]) and frames_BTD[1, 1:].abs().sum() == 0


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch_mates(encoder: HierarchicalVisualEncoder) -> None:
    frames_NHWC, lengths_B = clips(*LENGTHS)
    together = encoder(frames_NHWC, lengths_B)
    frames = together.frames_ND.split(list(LENGTHS))
    words = together.words_MD.split([encoder.config.word_count(length) for length in LENGTHS])
    for sample, part in enumerate(frames_NHWC.split(list(LENGTHS))):
        alone = encoder(part, lengths_B[sample : sample + 1])
        torch.testing.assert_close(frames[sample], alone.frames_ND, atol=1e-5, rtol=0)
        torch.testing.assert_close(words[sample], alone.words_MD, atol=1e-5, rtol=0)
        torch.testing.assert_close(together.sentence_BD[sample], alone.sentence_BD[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_order_of_frames_matters_at_every_level(encoder: HierarchicalVisualEncoder) -> None:
    frames_NHWC, lengths_B = clips(20)
    forward, backward = encoder(frames_NHWC, lengths_B), encoder(frames_NHWC.flip(0), lengths_B)
    assert not torch.allclose(forward.words_MD.flip(0), backward.words_MD, atol=1e-3)
    assert not torch.allclose(forward.sentence_BD, backward.sentence_BD, atol=1e-3)


def test_save_and_load_are_exact(encoder: HierarchicalVisualEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, HierarchicalVisualEncoder)
    assert loaded.config.backbone_config.model_type == "vit" and loaded.config.stride == 4
    frames_NHWC, lengths_B = clips(9, 5)
    assert torch.equal(loaded(frames_NHWC, lengths_B).words_MD, encoder(frames_NHWC, lengths_B).words_MD)
    assert torch.equal(loaded(frames_NHWC, lengths_B).sentence_BD, encoder(frames_NHWC, lengths_B).sentence_BD)
    again = build_visual(visual_config(path=str(tmp_path)), PIXELS, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), encoder.parameters(), strict=True))


def test_new_weights() -> None:
    built = build_visual(visual_config(width=128), PIXELS, torch.float32)
    assert built.word_level.merge.project.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert built.sentence_pool.query.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(built.word_norm.weight, torch.ones(128)) and built.frame_projection.bias.abs().sum() == 0
    assert not any(isinstance(module, torch.nn.modules.batchnorm._NormBase) for module in built.modules())
    assert "pooler" not in " ".join(name for name, _ in built.named_parameters())


def test_frames_are_normalised_in_float32_then_cast() -> None:
    from pipeline.models.frame_level import normalise

    frames_NHWC, _ = clips(2)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (frames_NHWC.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    torch.testing.assert_close(normalise(frames_NHWC, mean, std, torch.float32), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        normalise(frames_NHWC, mean, std, torch.bfloat16), normalise(frames_NHWC, mean, std, torch.float32).bfloat16()
    )
    assert frames_NHWC.dtype == torch.uint8


def test_bfloat16_parameters_give_bfloat16_outputs() -> None:
    built = build_visual(visual_config(), PIXELS, torch.bfloat16).eval()
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    output = built(*clips(5, 3))
    assert output.words_MD.dtype == torch.bfloat16 and output.sentence_BD.isfinite().all()


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_every_weight_of_a_full_encoder_gets_a_gradient_with_and_without_checkpointing() -> None:
    built = build_visual(visual_config(), PIXELS, torch.float32)
    shake(built)
    grads: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            built.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        built.train().zero_grad(set_to_none=True)
        output = built(*clips(9, 4))
        (output.sentence_BD.square().sum() + output.words_MD.square().sum()).backward()
        grads.append({name: _grad(parameter) for name, parameter in built.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-4, rtol=1e-4)
        if ".key.bias" not in name:  # softmax does not see a key bias
            assert grad.abs().sum() > 0, name


@pytest.mark.parametrize(("train", "wants"), [("frozen", 0), ("lora", 1), ("full", 1)])
def test_backbone_modes(train: str, wants: int, tmp_path: Path) -> None:
    sizes = {"width": 24, "layers": 1, "heads": 2, "feed_forward": 32}
    backbone = BackboneConfig.model_validate({"tiny": sizes, "train": train, "lora_rank": 2})
    built = build_visual(visual_config(backbone=backbone), PIXELS, torch.float32).train()
    trainable = [name for name, p in built.backbone.named_parameters() if p.requires_grad]
    assert bool(trainable) == bool(wants) and built.backbone.model.training == bool(wants)
    assert train != "lora" or all("lora_" in name for name in trainable)
    built(*clips(3)).sentence_BD.sum().backward()
    assert built.frame_projection.weight.grad is not None
    assert all(
        (p.grad is not None) == p.requires_grad for p in built.backbone.parameters() if p.requires_grad or not wants
    )
    if train == "lora":
        shake(built)
        built.eval().save_pretrained(tmp_path)
        loaded = build_visual(visual_config(path=str(tmp_path)), PIXELS, torch.float32).eval()
        assert torch.equal(loaded(*clips(6)).sentence_BD, built(*clips(6)).sentence_BD)
        assert [n for n, p in loaded.backbone.named_parameters() if p.requires_grad] == trainable


def test_a_frozen_backbone_builds_no_graph() -> None:
    backbone = BackboneConfig(tiny=TinyVit(width=24, layers=1, heads=2, feed_forward=32), train="frozen")
    built = build_visual(visual_config(backbone=backbone), PIXELS, torch.float32)
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    assert not built.backbone(pixels).requires_grad


@pytest.mark.parametrize("pool", ["cls", "mean", "cls_mean"])
def test_pooling_and_passes(pool: str) -> None:
    sizes = {"width": 24, "layers": 1, "heads": 2, "feed_forward": 32}
    backbone = BackboneConfig.model_validate({"tiny": sizes, "pool": pool})
    built = build_visual(visual_config(backbone=backbone), PIXELS, torch.float32).eval()
    pixels = torch.randn(5, 3, PIXELS, PIXELS)
    tokens = built.backbone.model(pixels).last_hidden_state
    expected = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    expected["cls_mean"] = torch.cat((expected["cls"], expected["mean"]), -1)
    torch.testing.assert_close(built.backbone(pixels), expected[pool])
    frames_NHWC, _ = clips(5)
    together = built.pooled(frames_NHWC)
    seen: list[int] = []
    built.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    built.config.frames_per_pass = 2
    torch.testing.assert_close(built.pooled(frames_NHWC), together, atol=1e-5, rtol=1e-5)
    assert seen == [2, 2, 1], "each pass is normalised and forgotten"


def _saved_siglip(folder: Path) -> Path:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model(
        "siglip", vision_config={**sizes, "image_size": 16, "patch_size": 8}, text_config={**sizes, "vocab_size": 20}
    )
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def test_the_vision_half_of_a_dual_encoder_at_another_size(tmp_path: Path) -> None:
    path = str(_saved_siglip(tmp_path))
    built = build_visual(visual_config(backbone=BackboneConfig(path=path, pool="mean")), PIXELS, torch.float32)
    whole = AutoModel.from_pretrained(path)
    saved, loaded = whole.vision_model.state_dict(), built.backbone.model.state_dict()
    some = next(name for name in saved if name.endswith("fc1.weight"))
    assert any(name.endswith(some) and torch.equal(loaded[name], saved[some]) for name in loaded)
    assert built.eval()(*clips(4)).words_MD.isfinite().all()
    with pytest.raises(RecipeError, match="needs a class token"):
        build_visual(visual_config(backbone=BackboneConfig(path=path, pool="cls")), PIXELS, torch.float32)(*clips(4))


def test_a_convolutional_backbone(tmp_path: Path) -> None:
    config = AutoConfig.for_model("convnext", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
    AutoModel.from_config(config).save_pretrained(tmp_path)
    backbone = BackboneConfig(path=str(tmp_path), pool="mean")
    built = build_visual(visual_config(backbone=backbone), PIXELS, torch.float32).eval()
    assert built.frame_projection.in_features == 16
    assert built(*clips(3)).sentence_BD.isfinite().all()


def test_image_statistics_come_from_the_backbone_folder(tmp_path: Path) -> None:
    path = _saved_siglip(tmp_path)
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    built = build_visual(visual_config(backbone=BackboneConfig(path=str(path), pool="mean")), PIXELS, torch.float32)
    assert list(built.config.image_mean) == [0.1, 0.2, 0.3] and list(built.config.image_std) == [0.4, 0.5, 0.6]


def test_stored_features_stand_for_the_frames(encoder: HierarchicalVisualEncoder) -> None:
    frames_NHWC, lengths_B = clips(9, 6)
    with torch.no_grad():
        features_NP = encoder.pooled(frames_NHWC)
        from_frames, from_features = encoder(frames_NHWC, lengths_B), encoder(features_NP, lengths_B)
        rounded = encoder(features_NP.half(), lengths_B)
    assert torch.equal(from_frames.words_MD, from_features.words_MD)
    assert torch.equal(from_frames.sentence_BD, from_features.sentence_BD)
    torch.testing.assert_close(rounded.words_MD, from_frames.words_MD, atol=5e-3, rtol=0)


def test_a_frozen_pretrained_backbone_has_an_identity(tmp_path: Path) -> None:
    def fingerprint(path: Path, **changes: Any) -> str:
        backbone = BackboneConfig(path=str(path), **{"train": "frozen", **changes})
        return build_visual(visual_config(backbone=backbone), PIXELS, torch.float32).config.backbone_fingerprint

    for name in ("one", "other"):
        new_backbone(AutoConfig.for_model("vit", **VIT_SIZES)).save_pretrained(tmp_path / name)
    one = fingerprint(tmp_path / "one")
    assert one and one == fingerprint(tmp_path / "one", frames_per_pass=2)
    assert one != fingerprint(tmp_path / "other")
    assert one != fingerprint(tmp_path / "one", pool="mean")
    assert fingerprint(tmp_path / "one", train="full") == ""  # its weights will change

    frozen = BackboneConfig(path=str(tmp_path / "one"), train="frozen")
    build_visual(visual_config(backbone=frozen), PIXELS, torch.float32).save_pretrained(tmp_path / "export")
    exported = build_visual(VisualConfig(path=str(tmp_path / "export")), PIXELS, torch.float32)
    assert exported.config.backbone_fingerprint == one  # features made before stage 2 serve stage 3 as well

    build_visual(visual_config(), PIXELS, torch.float32).save_pretrained(tmp_path / "trained")
    trained = build_visual(VisualConfig(path=str(tmp_path / "trained")), PIXELS, torch.float32)
    assert trained.config.backbone_fingerprint not in ("", one)


@pytest.mark.parametrize(
    ("frames", "lengths", "words"),
    [
        (clips(4)[0], [3], "frame lengths of 3 frames do not describe 4 packed frames"),
        (clips(4)[0], [4, 0], "hold an empty clip, or no clip"),
        (clips(4)[0].float(), [4], "expected torch.uint8"),
        (clips(4)[0][:, :16], [4], "expected torch.uint8"),
        (clips(65)[0], [65], "a clip of 65 frames exceeds max_frames 64"),
    ],
)
def test_unusable_batches(
    encoder: HierarchicalVisualEncoder, frames: torch.Tensor, lengths: list[int], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        encoder(frames, torch.tensor(lengths))


def test_the_attention_of_both_levels_is_chosen_by_their_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = SentenceLevelConfig(layers=1, heads=4)
    word = WordLevelConfig(layers=2, heads=8)
    built = build_visual(visual_config(width=32, word=word, sentence=sentence), PIXELS, torch.bfloat16)
    parts = [*built.word_level.frame_blocks, *built.word_level.word_blocks, *built.sentence_blocks, built.sentence_pool]
    assert {part.attention for part in parts} == {"sdpa"}, "a new encoder runs everywhere"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    built.choose_attention("auto", "cuda")
    assert [part.attention for part in parts] == ["sdpa"] * 3 + ["torch_varlen"] * 2
    with pytest.raises(RecipeError, match=r"torch_varlen cannot run the encoder's word level .* not 4"):
        built.choose_attention("torch_varlen", "cuda")


def test_a_layout_for_another_encoder_is_refused(encoder: HierarchicalVisualEncoder) -> None:
    frames_NHWC, lengths_B = clips(9, 5)
    sizes = encoder.config.clip_sizes()
    ours, other = (ClipLayout.of([9, 5], size) for size in (sizes, sizes._replace(window_frames=8)))
    expected = encoder(frames_NHWC, lengths_B).sentence_BD
    assert torch.equal(encoder(frames_NHWC, layout=ours).sentence_BD, expected)
    with pytest.raises(DataError, match=r"made for ClipSizes\(window_frames=8.*the encoder has"):
        encoder(frames_NHWC, layout=other)


def test_unusable_recipes(tmp_path: Path) -> None:
    def build(pixels: int = PIXELS, **changes: object) -> None:
        build_visual(visual_config(**changes), pixels, torch.float32)

    with pytest.raises(RecipeError, match="heads do not divide width 30"):
        build(width=30, word=WordLevelConfig(heads=4))
    with pytest.raises(RecipeError, match="40 is not a multiple of the backbone's patch size 16; use 32"):
        build(pixels=40)
    with pytest.raises(RecipeError, match=r"tiny.heads: 5 heads do not divide"):
        build(backbone=BackboneConfig(tiny=TinyVit(heads=5)))
    with pytest.raises(RecipeError, match=r"give path .an exported encoder. or backbone"):
        build(backbone=None)
    with pytest.raises(RecipeError, match=r"backbone: give path or tiny"):
        build(backbone=BackboneConfig())
    with pytest.raises(RecipeError, match="cannot load a vision model"):
        build(backbone=BackboneConfig(path=str(tmp_path / "absent")))
    with pytest.raises(RecipeError, match=r"model.visual.path: cannot read a model"):
        build(path=str(tmp_path / "absent"))
    with pytest.raises(RecipeError, match="is not one of cls, mean, cls_mean"):
        VisualEncoderConfig(pool="max")


def test_exports_that_do_not_fit(encoder: HierarchicalVisualEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(RecipeError, match="was trained on 32"):
        build_visual(visual_config(path=str(tmp_path / "encoder")), 64, torch.float32)
    AutoConfig.for_model("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(RecipeError, match="holds a 'llama' model, not a visual encoder"):
        build_visual(visual_config(path=str(tmp_path / "llama")), PIXELS, torch.float32)


def test_backbones_that_cannot_be_used(tmp_path: Path) -> None:
    from pipeline.models.frame_level import feature_width, vision_config

    with pytest.raises(RecipeError, match="no hidden_size, hidden_dim or hidden_sizes"):
        feature_width(AutoConfig.for_model("timm_backbone"))
    AutoConfig.for_model("vitmatte").save_pretrained(tmp_path / "matte")  # has no entry in AutoModel
    with pytest.raises(RecipeError, match="cannot build as a vision tower"):
        vision_config(str(tmp_path / "matte"))


def test_the_sentence_level_is_computed_where_it_is_read(encoder: HierarchicalVisualEncoder) -> None:
    batch = clips(5, 3)
    calls: list[object] = []
    encoder.sentence_pool.register_forward_hook(lambda *_: calls.append(_))
    with torch.no_grad():
        whole, words = encoder(*batch), encoder(*batch, sentences=False)
    assert len(calls) == 1 and words.sentence_BD is None
    assert torch.equal(whole.words_MD, words.words_MD) and torch.equal(whole.frames_ND, words.frames_ND)
