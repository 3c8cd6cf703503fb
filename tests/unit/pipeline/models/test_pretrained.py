"""What pretrained parts bring: nothing but weights and token ids acts without a word, and limits are told at load."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders, normalizers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.config.schema import BackboneConfig, LlmConfig, ModelConfig, TextEncoderConfig
from pipeline.errors import RecipeError
from pipeline.inference.generate import GenerationOptions, end_ids, translate_batch
from pipeline.inference.load import load_export
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.language import embedding_rms, load_language
from pipeline.models.llava_slt import checkpoint_in_eval
from pipeline.models.pretrained import check_positions, log_tokenizer_settings, position_limit
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.registry import build_llava_slt, build_visual
from pipeline.models.text_encoder import TextEncoder
from pipeline.stages.freezing import check_layers, frozen_buffers
from tests.unit.pipeline.models.tiny import bpe_tokenizer, clips, data_config, shake, visual_config

GREEDY_WORDS = {"min_new_tokens": 20, "early_stopping": True, "suppress_tokens": [5], "repetition_penalty": 1.3}


def gpt2(folder: Path, rows: int = 0, positions: int = 64, **settings: float) -> Path:
    """A GPT-2 with learned positions, dropout 0.1 and a generation config of its own."""
    tokenizer = bpe_tokenizer(folder)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": positions, "vocab_size": rows or len(tokenizer)}
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [tokenizer.eos_token_id, 7]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **ids, **settings))
    model.save_pretrained(folder)
    held = {**json.loads(GenerationConfig(**ids).to_json_string()), **GREEDY_WORDS}
    (folder / "generation_config.json").write_text(json.dumps(held))
    return folder


def test_generation_settings_of_a_pretrained_llm_are_dropped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        llm, _ = load_language(LlmConfig(path=str(gpt2(tmp_path))), torch.float32)
    said = next(record.getMessage() for record in caplog.records if "settings dropped" in record.getMessage())
    assert all(f"{name}=" in said for name in GREEDY_WORDS)
    assert any("attn_pdrop=0.1" in record.getMessage() for record in caplog.records)
    kept = llm.generation_config.to_diff_dict()
    assert set(kept) <= {"bos_token_id", "eos_token_id", "transformers_version"} and len(kept["eos_token_id"]) == 2
    # what the caller gives is all there is: nothing is filled in from the folder
    ids_BL = torch.tensor([[1, 40]])
    found = llm.generate(ids_BL, generation_config=GenerationOptions(max_new_tokens=3).config(0, 0), do_sample=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain.generation_config = GenerationConfig()
    expected = plain.generate(ids_BL, max_new_tokens=3, do_sample=False, eos_token_id=0, pad_token_id=0)
    assert found.tolist() == expected.tolist()


def test_generation_settings_in_a_config_do_not_come_back_with_the_export(tmp_path: Path) -> None:
    """Older folders hold them in config.json, which an export carries along."""
    source, out = gpt2(tmp_path / "llm"), tmp_path / "export"
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, "min_new_tokens": 5}))
    model = ModelConfig(llm=LlmConfig(path=str(source)), visual=visual_config())
    live, processor = build_llava_slt(model, data_config(), "signs: {video} text:", torch.float32)
    live.save_pretrained(out)
    processor.save_pretrained(out)
    frames_NHWC, lengths_B = clips(9)

    def new_tokens(translator: Any, eos_id: int) -> list[int]:
        options = GenerationOptions(max_new_tokens=8).config(eos_id, processor.pad_id)
        inputs = {**processor([9]), "frames": frames_NHWC, "frame_lengths": lengths_B}
        found: list[int] = translator.generate(**inputs, generation_config=options)[0].tolist()
        return found

    first = new_tokens(live.eval(), processor.eos_id)[0]
    assert new_tokens(live, first) == [first]
    assert new_tokens(load_export(out)[0], first) == [first]


def test_every_end_token_of_an_llm_ends_an_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In training's evaluations, in the export's own settings, and with the export."""
    source, out = gpt2(tmp_path / "llm"), tmp_path / "export"
    frames_NHWC, lengths_B = clips(9)
    options = GenerationOptions(max_new_tokens=8)

    def build(*ends: int) -> tuple[Any, LlavaSltProcessor]:
        held = json.loads((source / "generation_config.json").read_text())
        (source / "generation_config.json").write_text(json.dumps({**held, "eos_token_id": list(ends)}))
        model = ModelConfig(llm=LlmConfig(path=str(source)), visual=visual_config())
        torch.manual_seed(0)
        live, processor = build_llava_slt(model, data_config(), "signs: {video} text:", torch.float32)
        shake(live, 0.5)
        return live.eval(), processor

    def ids(model: Any, processor: LlavaSltProcessor) -> list[int]:
        inputs = {**processor([9]), "frames": frames_NHWC, "frame_lengths": lengths_B}
        config = options.config(end_ids(model, processor), processor.pad_id)
        found: list[int] = model.generate(**inputs, generation_config=config)[0].tolist()
        return found

    live, processor = build(AutoTokenizer.from_pretrained(source).eos_token_id)
    (source / "config.json").write_text(
        json.dumps({**json.loads((source / "config.json").read_text()), "eos_token_id": 9})
    )
    assert live.generation_config.eos_token_id == [processor.eos_id, 7]  # the config's list
    whole = ids(live, processor)
    second = next(at for at, token in enumerate(whole) if token != whole[0])
    with caplog.at_level(logging.INFO):
        live, processor = build(processor.eos_id, whole[second], 10_000)
    token = processor.tokenizer.convert_ids_to_tokens(whole[second])
    assert f"{source}: answers end at {token!r} ({whole[second]}) too" in caplog.messages
    nine = processor.tokenizer.convert_ids_to_tokens(9)
    assert f"{source}: listed as eos, but ordinary words of the tokenizer: {nine}" in caplog.messages
    live.save_pretrained(out)
    processor.save_pretrained(out)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [
        processor.eos_id,
        whole[second],
    ]
    layout = ClipLayout.of([9], live.visual.config.clip_sizes())
    batch = {**processor([9]), "frames_NHWC": frames_NHWC, "layout": layout}
    for model in (live, load_export(out)[0]):
        assert ids(model, processor) == whole[: second + 1]
        expected = processor.tokenizer.decode(whole[:second]).strip()
        assert translate_batch(model, processor, batch, options) == [expected]


def test_a_control_token_of_the_config_ends_an_answer_too(tmp_path: Path) -> None:
    source = gpt2(tmp_path, rows=400)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.save_pretrained(source)
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    (source / "generation_config.json").unlink()
    (source / "config.json").write_text(
        json.dumps({**json.loads((source / "config.json").read_text()), "eos_token_id": eot})
    )
    llm, _ = load_language(LlmConfig(path=str(source)), torch.float32)
    assert llm.generation_config.eos_token_id == [tokenizer.eos_token_id, eot]


def test_what_a_tokenizer_does_to_texts_by_itself_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = bpe_tokenizer(tmp_path)
    with caplog.at_level(logging.INFO):
        log_tokenizer_settings(tokenizer, "plain")
        assert not caplog.records
        tokenizer.backend_tokenizer.normalizer = normalizers.NFD()
        log_tokenizer_settings(tokenizer, "composed again")
        assert not caplog.records
        tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.backend_tokenizer.decoder = decoders.WordPiece(cleanup=True)
        log_tokenizer_settings(tokenizer, "bert")
    assert caplog.messages == ["bert: its own tokenizer settings: decoder.cleanup=True, normalizer='ÄÉš -> aes'"]


def test_fewer_embeddings_than_ids(tmp_path: Path) -> None:
    folder = gpt2(tmp_path, rows=300)
    ids = len(bpe_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(RecipeError, match=rf"model\.llm: .* table has 300 rows, its tokenizer makes {ids} ids\. Use"):
        load_language(LlmConfig(path=str(folder)), torch.float32)
    load_language(LlmConfig(path=str(gpt2(tmp_path / "larger", rows=ids + 40))), torch.float32)


def test_an_unused_control_token_may_lie_beyond_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Text models of the Gemma 3 family come with the tokenizer of those that see images."""
    folder = gpt2(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    load_language(LlmConfig(path=str(folder)), torch.float32)
    assert "model.llm: control tokens without an embedding, not to be used in a prompt: <image>" in caplog.text
    model = ModelConfig(llm=LlmConfig(path=str(folder)), visual=visual_config())
    with pytest.raises(RecipeError, match=r"connector\.prompt: holds the token with id \d+, but the embedding table"):
        build_llava_slt(model, data_config(), "<image> {video} text:", torch.float32)
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"embedding table has \d+ rows, its tokenizer makes \d+ ids"):
        load_language(LlmConfig(path=str(folder)), torch.float32)


def test_position_tables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm, _ = load_language(LlmConfig(path=str(gpt2(tmp_path))), torch.float32)
    check_positions(llm, 64, "data.block_tokens", "model.llm", "lower it")
    with pytest.raises(
        RecipeError, match=r"data\.block_tokens: 65 positions, but the model of model\.llm has a table of"
    ):
        check_positions(llm, 65, "data.block_tokens", "model.llm", "lower it")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    rotary = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, max_position_embeddings=8))
    assert position_limit(rotary) is None
    check_positions(rotary, 9, "data.block_tokens", "model.llm", "lower it")
    assert "more than the 8 that the model of model.llm was made for" in caplog.text


@pytest.mark.parametrize(
    ("kind", "stated"), [("bloom", "seq_length"), ("bloom", "max_seq_len"), ("llama", "max_position_embeddings")]
)
def test_a_stated_length_is_told_under_its_usual_names(
    kind: str, stated: str, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **ids, **{stated: 8}))
    check_positions(llm, 8, "data.block_tokens", "model.llm", "lower it")
    assert not caplog.records
    check_positions(llm, 9, "data.block_tokens", "model.llm", "lower it")
    assert "9 positions, more than the 8 that the model of model.llm was made for" in caplog.text


def test_biases_of_a_fixed_length_are_a_table() -> None:
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 50, "max_seq_len": 16}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **sizes)).eval()
    assert position_limit(llm) == 16
    llm(input_ids=torch.full((1, 16), 5), use_cache=False)
    with pytest.raises(RuntimeError):
        llm(input_ids=torch.full((1, 17), 5), use_cache=False)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("openai-gpt", {}),
        ("ctrl", {"dff": 32}),
        ("gptj", {"rotary_dim": 8}),
        ("codegen", {"rotary_dim": 8, "n_head": 4}),
    ],
)
def test_position_tables_under_other_names_and_as_buffers(kind: str, sizes: dict[str, int]) -> None:
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 50, **sizes}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **ids)).eval()
    assert position_limit(llm) == 16
    llm(input_ids=torch.full((1, 16), 5), use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        llm(input_ids=torch.full((1, 17), 5), use_cache=False)


def test_the_bos_of_an_llm_text_encoder_takes_a_position_too(tmp_path: Path) -> None:
    folder = gpt2(tmp_path, positions=16)
    fits = TextEncoder.from_config(TextEncoderConfig(kind="llm", path=str(folder), max_tokens=15))
    assert fits.encode(["tomorrow it rains in the north " * 20]).tokens[0].shape == (15, 32)
    with pytest.raises(RecipeError, match=r"max_tokens and the bos token: 17 positions, but .* has a table of 16"):
        TextEncoder.from_config(TextEncoderConfig(kind="llm", path=str(folder), max_tokens=16))


def test_dropout_of_a_backbone_and_flags_of_a_text_encoder_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit, bert = tmp_path / "vit", tmp_path / "bert"
    config = AutoConfig.for_model("vit", **sizes, image_size=32, patch_size=8, hidden_dropout_prob=0.3)
    AutoModel.from_config(config).save_pretrained(vit)
    tokenizer = bpe_tokenizer(bert)
    tokenizer.init_kwargs["do_lower_case"] = True
    tokenizer.save_pretrained(bert)
    AutoModel.from_config(AutoConfig.for_model("bert", **sizes, vocab_size=len(tokenizer))).save_pretrained(bert)
    dropout = f"{vit}: its own dropout acts while it trains: hidden_dropout_prob=0.3"
    frozen, full = (BackboneConfig(path=str(vit), train=mode) for mode in ("frozen", "full"))
    with caplog.at_level(logging.INFO):
        build_visual(visual_config(backbone=frozen), 32, torch.float32)
        assert dropout not in caplog.messages  # it runs in eval mode
        build_visual(visual_config(backbone=full), 32, torch.float32).save_pretrained(tmp_path / "encoder")
        build_visual(visual_config(path=str(tmp_path / "encoder"), backbone=None), 32, torch.float32)
        TextEncoder.from_config(TextEncoderConfig(path=str(bert), max_tokens=16))
    assert dropout in caplog.messages
    assert dropout.replace(str(vit), str(tmp_path / "encoder")) in caplog.messages
    assert f"{bert}: its own tokenizer settings: do_lower_case=True" in caplog.messages


def test_positions_of_a_text_encoder_of_roberta_kind(tmp_path: Path) -> None:
    """514 rows are 512 positions there: the count starts after the padding's id."""
    tokenizer = bpe_tokenizer(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "roberta", **sizes, vocab_size=len(tokenizer), max_position_embeddings=34, pad_token_id=1
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    TextEncoder.from_config(TextEncoderConfig(path=str(tmp_path), max_tokens=32))
    with pytest.raises(RecipeError, match=r"model\.text_encoder\.max_tokens: 33 positions, but .* has a table of 32"):
        TextEncoder.from_config(TextEncoderConfig(path=str(tmp_path), max_tokens=33))


def test_checkpointing_a_frozen_llm_changes_no_number(tmp_path: Path) -> None:
    llm, _ = load_language(LlmConfig(path=str(gpt2(tmp_path, resid_pdrop=0.5, embd_pdrop=0.5))), torch.float32)
    llm.requires_grad_(False)
    embeds_BLE = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = llm.eval()(inputs_embeds=embeds_BLE).logits
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    llm.train()
    checkpoint_in_eval(llm)
    assert any(part.training for part in llm.modules())
    found = llm(inputs_embeds=embeds_BLE, use_cache=False).logits
    torch.testing.assert_close(found, expected)


def test_checkpointing_keeps_a_frozen_layer_in_eval_mode_also_where_it_reads_dropout_from_its_config() -> None:
    config = AutoConfig.for_model(
        "falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, hidden_dropout=0.5,
        attention_dropout=0.5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    llm = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    calls: list[bool] = []
    llm.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(llm.transformer.h[0].training))
    embeds_BLE = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = llm(inputs_embeds=embeds_BLE, use_cache=False).logits
    (gradient,) = torch.autograd.grad(expected.sum(), embeds_BLE)
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(2):  # every switch to train mode calls it again
        llm.train()
        checkpoint_in_eval(llm)
    calls.clear()
    found = llm(inputs_embeds=embeds_BLE, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), embeds_BLE)[0], gradient)
    assert calls == [False, False]  # computed, and computed again in the backward pass


def test_scale_of_embeddings_is_that_of_looked_up_ones() -> None:
    """Gemma 3 multiplies by the root of the width after the look-up."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3_text", **sizes, num_key_value_heads=1, head_dim=32, vocab_size=128)
    llm = AutoModelForCausalLM.from_config(config)
    looked_up = llm.get_input_embeddings()(torch.arange(128)).pow(2).mean().sqrt()
    assert embedding_rms(llm) == pytest.approx(float(looked_up), rel=1e-5)
    assert embedding_rms(llm) == pytest.approx(
        8 * float(llm.get_input_embeddings().weight.pow(2).mean().sqrt()), rel=1e-3
    )


class Backbone(nn.Module):
    """A part that stays in eval mode while it is frozen, as the visual encoder's backbone does."""

    def __init__(self, norm: nn.Module, frozen: bool) -> None:
        super().__init__()
        self.norm, self.frozen = norm.requires_grad_(not frozen), frozen

    def train(self, mode: bool = True) -> Backbone:
        return super().train(mode and not self.frozen)


@pytest.mark.parametrize(
    ("norm", "frozen", "refused"),
    [
        (nn.BatchNorm2d(4), False, True),
        (nn.SyncBatchNorm(4), False, True),
        (nn.BatchNorm1d(4), True, False),
        (nn.BatchNorm2d(4, track_running_stats=False), True, True),
        (nn.InstanceNorm2d(4), False, False),
        (nn.InstanceNorm2d(4, track_running_stats=True), False, True),
        (nn.GroupNorm(2, 4), False, False),
    ],
    ids=["batch", "sync", "frozen", "no statistics", "instance", "tracking instance", "group"],
)
def test_layers_that_mix_samples(norm: nn.Module, frozen: bool, refused: bool) -> None:
    model = nn.ModuleDict({"visual": Backbone(norm, frozen), "connector": nn.Linear(4, 4)})
    if not refused:
        check_layers(model)
        return
    with pytest.raises(
        RecipeError, match=r"1 layers mix the samples of a micro-batch, the first is visual\.norm"
    ) as told:
        check_layers(model)
    advice = "it is frozen, but stores no statistics" if frozen else r"freeze the part \(model\.visual\.backbone\.train"
    assert re.search(advice, str(told.value))
    if not frozen:
        with pytest.raises(RecipeError, match=r"the number of ranks\. Fix: take a model with layer norms"):
            check_layers(nn.ModuleDict({"llm": Backbone(norm, frozen)}))


def test_statistics_of_frozen_layers_belong_to_what_must_not_change() -> None:
    model = nn.Sequential(Backbone(nn.BatchNorm1d(4), True), nn.BatchNorm1d(4))
    names = [name for name, _ in frozen_buffers(model)]
    assert names == ["0.norm.running_mean", "0.norm.running_var", "0.norm.num_batches_tracked"]
