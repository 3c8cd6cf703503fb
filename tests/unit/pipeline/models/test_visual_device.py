"""The encoder's forward and backward pass ask the device for nothing, and give the numbers they always gave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models import HierarchicalVisualEncoder
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.registry import build_visual
from tests.unit.pipeline.models.tiny import PIXELS, shake, visual_config

LENGTHS = (13, 1, 30, 7, 4)


class NoCopies(TorchDispatchMode):
    """Refuses operations that bring something of the host to the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        assert all(tensor.is_meta for tensor in tensors), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_waits_for_the_device(checkpointing: bool) -> None:
    """A tensor on the meta device has no numbers, so whatever asks for one (`item`, `tolist`, `nonzero`, a boolean
    index) fails."""
    built = build_visual(visual_config(), PIXELS, torch.float32)
    if checkpointing:
        built.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layout = ClipLayout.of(LENGTHS, built.config.clip_sizes()).to("meta")
    built.to("meta").train()
    frames = torch.empty(sum(LENGTHS), PIXELS, PIXELS, 3, dtype=torch.uint8, device="meta")
    with NoCopies():
        output = built(frames, layout=layout)
        (
            output.sentence_BD.sum() + output.words_MD.sum() + output.layout.pad_words(output.words_MD)[0].sum()
        ).backward()
    assert output.words_MD.shape == (16, 32) and all(p.grad is not None for p in built.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        built(frames, torch.tensor(LENGTHS, device="meta"))


def test_samples_in_float64_equal_samples_alone_with_their_gradients() -> None:
    """Every path: windows, shifted windows, merging, word windows, whole samples, pooling, centring."""
    built = build_visual(visual_config(), PIXELS, torch.float64).train()
    shake(built)
    features_NP = torch.randn(sum(LENGTHS), 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = built(features_NP, torch.tensor(LENGTHS))
    alone = [built(part, torch.tensor([len(part)])) for part in features_NP.split(LENGTHS)]
    gradients = []
    for outputs in ([together], alone):
        built.zero_grad()
        parts = [torch.cat([o[name] for o in outputs]) for name in ("frames_ND", "words_MD", "sentence_BD")]
        sum(part.sin().sum() for part in parts).backward()
        gradients.append((parts, {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}))
    (found, grads), (right, right_grads) = gradients
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)
    assert len(grads) > 30
    for name, grad in grads.items():
        torch.testing.assert_close(grad, right_grads[name], atol=1e-10, rtol=1e-10, msg=name)


def with_written_weights() -> HierarchicalVisualEncoder:
    built = build_visual(visual_config(), PIXELS, torch.float32).eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(built.named_parameters()):
            wave = (torch.arange(parameter.numel(), dtype=torch.float64) * 0.37 + number).sin().view(parameter.shape)
            parameter.copy_(0.15 * wave + ("norm" in name and name.endswith("weight")))
    return built


@torch.no_grad()
def test_old_weights_give_their_old_numbers() -> None:
    """The numbers are those of the encoder that padded windows and masked them."""
    steps = torch.arange(sum(LENGTHS) * PIXELS * PIXELS * 3)
    frames_NHWC = ((steps * 7919 + steps // 997) % 256).to(torch.uint8).view(-1, PIXELS, PIXELS, 3)
    output = with_written_weights()(frames_NHWC, torch.tensor(LENGTHS))
    old = {
        "frames": [0.7977529, -0.6649529, 0.8204936, -0.6668531],
        "words": [0.4669138, 1.3294543, 0.3632259, 0.5111851, 0.2405961],
        "sentences": [0.5013268, 0.4681817, 0.5017358, 0.5009010, 0.4866322],
    }
    found = {
        "frames": output.frames_ND[[0, 13, 30, 54], 7],
        "words": output.words_MD[[0, 3, 4, 7, 15], 5],
        "sentences": output.sentence_BD[:, 11],
    }
    for name, values in old.items():
        torch.testing.assert_close(found[name], torch.tensor(values), atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_frame_backbones_attend_without_a_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask would cost the flash kernel inside `scaled_dot_product_attention`."""
    from transformers import AutoConfig, AutoModel

    from pipeline.models.frame_level import FrameBackbone

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": PIXELS}
    config = AutoConfig.for_model(kind, patch_size=16, intermediate_size=32, **sizes)
    masks: list[Any] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        masks.append(attn_mask)
        return plain(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    backbone = FrameBackbone(AutoModel.from_config(config).eval(), "cls", PIXELS)
    assert backbone(torch.randn(3, 3, PIXELS, PIXELS)).shape == (3, 24)
    assert masks == [None, None]
