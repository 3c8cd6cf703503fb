"""The whole model: frozen parts, ragged batches, generation against a manual search, save and load."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from pipeline.config.schema import ConnectorConfig, LlmConfig
from pipeline.errors import DataError, RecipeError
from pipeline.losses import token_cross_entropy
from pipeline.models import LlavaSltForConditionalGeneration
from pipeline.models.attention import implementation
from pipeline.models.generation_attention import switched
from pipeline.models.language import embedding_rms, load_llm, output_head
from pipeline.models.llava_slt import VIDEO_TOKEN_ID
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.registry import build_llava_slt
from tests.unit.pipeline.models.tiny import bpe_tokenizer, clips, data_config, model_config, shake, visual_config

PROMPT = "signs: {video} sentence:"
LENGTHS = (13, 4, 9)
TEXTS = ["tomorrow it rains", "here", "I am here in the north"]

Built = tuple[LlavaSltForConditionalGeneration, LlavaSltProcessor]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe_tokenizer(folder)
    model, processor = build_llava_slt(model_config(folder), data_config(), PROMPT, torch.float32)
    shake(model)
    return model.eval(), processor


def freeze(model: LlavaSltForConditionalGeneration) -> None:
    model.requires_grad_(False)
    model.connector.requires_grad_(True)


def packed(model: LlavaSltForConditionalGeneration) -> AbstractContextManager[None]:
    return switched(model.llm, implementation("sdpa"))


@pytest.fixture
def frames() -> dict[str, torch.Tensor]:
    frames_NHWC, lengths_B = clips(*LENGTHS)
    return {"frames": frames_NHWC, "frame_lengths": lengths_B}


def test_only_the_connector_gets_gradients(built: Built, frames: dict[str, torch.Tensor]) -> None:
    model, processor = built
    freeze(model)
    model.train()
    assert not model.visual.training and not model.llm.training and model.connector.training
    grads: list[torch.Tensor] = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            layers = [part for part in model.train().llm.modules() if part.training]
            # transformers checkpoints in train mode only: so are the layers, and nothing inside them
            assert layers and all(getattr(part, "gradient_checkpointing", False) for part in layers)
        model.zero_grad(set_to_none=True)
        with packed(model):
            model(**processor.pack(LENGTHS, TEXTS), **frames).loss_sum.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert set(found) == {f"connector.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")}
        grads.append(found["connector.up.weight"])
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[0], grads[1])
    model.gradient_checkpointing_disable()
    model.requires_grad_(True).eval()


def test_a_frozen_encoder_builds_no_graph(built: Built, frames: dict[str, torch.Tensor]) -> None:
    model, _ = built
    freeze(model)
    seen = []
    hook = model.visual.register_forward_hook(lambda module, inputs, output: seen.append(output.words_MD.requires_grad))
    tokens_ME, counts_B = model.encode_video(**frames)
    hook.remove()
    assert seen == [False] and tokens_ME.requires_grad and counts_B.tolist() == [4, 1, 3]
    model.requires_grad_(True)


@torch.no_grad()
def test_loss_equals_that_of_padded_logits(built: Built, frames: dict[str, torch.Tensor]) -> None:
    model, processor = built
    row, batch = processor.pack(LENGTHS, TEXTS), processor(LENGTHS, TEXTS)
    with packed(model):
        output = model(**row, **frames)
    logits_BLV = model(**batch, **frames).logits
    answers = [processor.answer_ids(text) for text in TEXTS]
    ends_B = batch["attention_mask"].sum(1)
    predicted = [
        logits_LV[end - 1 - len(a) : end - 1] for logits_LV, end, a in zip(logits_BLV, ends_B, answers, strict=True)
    ]
    targets_N = torch.tensor([token for answer in answers for token in answer])
    expected = torch.nn.functional.cross_entropy(torch.cat(predicted), targets_N, reduction="sum")
    torch.testing.assert_close(output.loss_sum, expected)
    assert torch.equal(row["answers"]["targets_N"], targets_N) and output.logits is None


@pytest.mark.parametrize("level", ["word", "frame"])
def test_a_sample_does_not_depend_on_its_batch_mates(level: str, tmp_path: Path) -> None:
    bpe_tokenizer(tmp_path)
    recipe = model_config(tmp_path, connector=ConnectorConfig.model_validate({"hidden": 24, "tokens": level}))
    model, processor = build_llava_slt(recipe, data_config(), PROMPT, torch.float32)
    shake(model)
    model.eval()
    frames_NHWC, lengths_B = clips(*LENGTHS)
    freeze(model)
    model.double().train()
    model.visual.eval()

    def loss_and_gradients(*samples: int) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        row = processor.pack([LENGTHS[n] for n in samples], [TEXTS[n] for n in samples])
        parts = [frames_NHWC.split(list(LENGTHS))[n] for n in samples]
        loss = model(**row, frames=torch.cat(parts), frame_lengths=lengths_B[list(samples)]).loss_sum
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.connector.parameters())]

    with packed(model):  # in float64, but for RMSNorm, which computes in float32
        together, alone = loss_and_gradients(0, 1, 2), [loss_and_gradients(n) for n in range(3)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.stack(parts).sum(0), rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_visual_tokens_stand_where_the_placeholders_are(built: Built, frames: dict[str, torch.Tensor]) -> None:
    model, processor = built
    ids_BL = processor(LENGTHS, TEXTS)["input_ids"]
    embeds_BLE = model.embed_inputs(ids_BL, **frames)
    tokens_ME, _ = model.encode_video(**frames)
    torch.testing.assert_close(embeds_BLE[ids_BL == VIDEO_TOKEN_ID], tokens_ME)
    text = ids_BL != VIDEO_TOKEN_ID
    assert torch.equal(embeds_BLE[text], model.llm.get_input_embeddings()(ids_BL[text]))
    assert VIDEO_TOKEN_ID not in range(model.llm.config.vocab_size)


@torch.no_grad()
def test_generate_equals_a_manual_greedy_search(built: Built, frames: dict[str, torch.Tensor]) -> None:
    model, processor = built
    calls = []
    hook = model.visual.register_forward_hook(lambda *args: calls.append(1))
    new_BL = model.generate(**processor(LENGTHS), **frames, max_new_tokens=6, do_sample=False)
    assert len(calls) == 1, "the encoder runs once"
    for sample, part in enumerate(frames["frames"].split(list(LENGTHS))):
        ids = list(processor.prompt_ids(LENGTHS[sample]))
        expected: list[int] = []
        while len(expected) < 6 and processor.eos_id not in expected:
            logits = model(torch.tensor([ids]), frames=part, frame_lengths=torch.tensor([LENGTHS[sample]])).logits
            expected.append(int(logits[0, -1].argmax()))
            ids.append(expected[-1])
        assert new_BL[sample, : len(expected)].tolist() == expected
    hook.remove()


@torch.no_grad()
def test_beam_search_and_samples_per_prompt(built: Built, frames: dict[str, torch.Tensor]) -> None:
    model, processor = built
    together = model.generate(**processor(LENGTHS), **frames, num_beams=3, max_new_tokens=5)
    first = frames["frames"][: LENGTHS[0]]
    alone = model.generate(
        **processor(LENGTHS[:1]), frames=first, frame_lengths=torch.tensor(LENGTHS[:1]), num_beams=3, max_new_tokens=5
    )
    assert together.shape[0] == 3 and together[0, : alone.shape[1]].tolist() == alone[0].tolist()
    several = model.generate(**processor(LENGTHS), **frames, num_beams=2, num_return_sequences=2, max_new_tokens=3)
    assert several.shape[0] == 6
    explicit = GenerationConfig(max_new_tokens=2, eos_token_id=processor.eos_id, pad_token_id=processor.pad_id)
    assert model.generate(**processor(LENGTHS), **frames, generation_config=explicit).shape[1] <= 2
    assert explicit.max_new_tokens == 2 and len(processor.decode(several)) == 6


def test_a_saved_folder_gives_equal_logits_in_a_fresh_process(
    built: Built, frames: dict[str, torch.Tensor], tmp_path: Path, repo_root: Path
) -> None:
    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    batch = {**processor(LENGTHS), **frames}
    with torch.no_grad():
        logits = model(**batch).logits
    torch.save({"batch": batch, "logits": logits}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, pipeline.models\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1]).eval()\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(**expected['batch']).logits, expected['logits'])\n"
        "assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight\n"
        "print(type(model).__name__, model.config.prompt)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"LlavaSltForConditionalGeneration {PROMPT}"


def test_parts_keep_their_weights_and_the_connector_starts_at_embedding_scale(tmp_path: Path) -> None:
    bpe_tokenizer(tmp_path)
    recipe = model_config(tmp_path, connector=ConnectorConfig(hidden=512))
    model, _ = build_llava_slt(recipe, data_config(), PROMPT, torch.float32)
    model.llm.save_pretrained(tmp_path / "llm")
    model.visual.save_pretrained(tmp_path / "visual")
    saved = LlmConfig(path=str(tmp_path / "llm"), tokenizer=str(tmp_path))
    recipe = model_config(
        tmp_path, llm=saved, visual=visual_config(path=str(tmp_path / "visual")), connector=ConnectorConfig(hidden=512)
    )
    again, _ = build_llava_slt(recipe, data_config(), PROMPT, torch.float32)
    for part in ("llm", "visual"):
        for one, other in zip(getattr(model, part).parameters(), getattr(again, part).parameters(), strict=True):
            assert torch.equal(one, other)
    rms = embedding_rms(again.llm)
    output = again.connector(torch.nn.functional.layer_norm(torch.randn(400, 32), (32,)))
    assert output.square().mean().sqrt().item() == pytest.approx(rms, rel=0.1)
    assert again.config.text_config is again.llm.config and again.config.visual_config is again.visual.config


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
@torch.no_grad()
def test_output_head_includes_what_a_family_does_after_it(kind: str) -> None:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    families: dict[str, dict[str, Any]] = {
        "granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25}, "gemma2": {"head_dim": 8}
    }  # fmt: skip
    extra = families[kind]
    config = AutoConfig.for_model(kind, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, **sizes, **extra)
    llm = AutoModelForCausalLM.from_config(config).eval()
    shake(llm, 0.5)
    ids_BL = torch.randint(0, 31, (2, 5))
    hidden_BLD = llm.get_decoder()(input_ids=ids_BL).last_hidden_state
    torch.testing.assert_close(output_head(llm)(hidden_BLD), llm(ids_BL).logits)
    loss_sum = token_cross_entropy(hidden_BLD[:, :-1].flatten(0, 1), output_head(llm), ids_BL[:, 1:].flatten(), 4)
    torch.testing.assert_close(loss_sum / 8, llm(ids_BL, labels=ids_BL).loss)


def test_batches_that_do_not_fit(built: Built, frames: dict[str, torch.Tensor]) -> None:
    model, processor = built
    with pytest.raises(DataError, match="video placeholders per sample, the encoder gives"):
        model(**processor([4, 13, 9]), **frames)
    with pytest.raises(DataError, match=r"has places for 10 visual tokens, the encoder gives 8 word tokens"):
        model(**processor.pack([13, 9, 12], TEXTS), **frames)
    with pytest.raises(DataError, match="video placeholders but no frames were given"):
        model(**processor(LENGTHS))
    text = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(text).logits, model.llm(text).logits)


def test_recipes_that_do_not_fit(tmp_path: Path) -> None:
    bpe_tokenizer(tmp_path)

    def build(data: dict[str, Any] | None = None, **changes: Any) -> None:
        build_llava_slt(model_config(tmp_path, **changes), data_config(**(data or {})), PROMPT, torch.float32)

    with pytest.raises(RecipeError, match=r"needs both model.llm and model.visual"):
        build(visual=None)
    with pytest.raises(RecipeError, match="128 exceeds the visual encoder's max_frames 64"):
        build(data={"max_frames": 128})
    with pytest.raises(RecipeError, match=r"model.llm.path: cannot load a causal language model"):
        build(llm=LlmConfig(path=str(tmp_path / "absent"), tokenizer=str(tmp_path)))
    with pytest.raises(RecipeError, match=r"model.llm: give path or tiny"):
        load_llm(LlmConfig(tokenizer=str(tmp_path)), torch.float32)
    sizes = model_config(tmp_path).llm
    assert sizes is not None and sizes.tiny is not None
    odd = sizes.model_copy(update={"tiny": sizes.tiny.model_copy(update={"heads": 3})})
    with pytest.raises(RecipeError, match="3 heads do not divide width 32"):
        load_llm(odd, torch.float32)
