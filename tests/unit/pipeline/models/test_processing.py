"""Prompt templates and batches: the ids of stage 1 around the video, masks from lengths, round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.errors import CheckpointError, RecipeError
from pipeline.models.language import bos_id, load_tokenizer
from pipeline.models.llava_slt import VIDEO_TOKEN_ID
from pipeline.models.processing import LlavaSltProcessor, ProcessorOptions
from tests.unit.pipeline.models.tiny import bpe_tokenizer, llm_config

PROMPT = "signs: {video} sentence:"
GLOSS, TEXT = "RAIN TOMORROW NORTH", "tomorrow it rains in the north"


def stage_one(tokenizer: PreTrainedTokenizerBase, gloss: str, text: str) -> list[int]:
    """The document stage 1 trains on: bos?, the rendered template, eos."""
    ids = tokenizer(f"signs: {gloss} sentence: {text}", add_special_tokens=False)["input_ids"]
    bos = bos_id(tokenizer)
    return [*([] if bos is None else [bos]), *ids, tokenizer.eos_token_id]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return bpe_tokenizer(tmp_path)


def assert_equals_stage_one(tokenizer: PreTrainedTokenizerBase) -> None:
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt=PROMPT))
    for gloss, text in ((GLOSS, TEXT), ("regen morgen nord", "ich bin hier"), ("IX-1 fs-ANNA", "42 % und mehr!")):
        whole = stage_one(tokenizer, gloss, text)
        before, behind = processor.before_ids, processor.after_ids + processor.answer_ids(text)
        assert whole[: len(before)] == before and whole[-len(behind) :] == behind
        between = str(tokenizer.decode(whole[len(before) : -len(behind)])).strip()
        alone = str(tokenizer.decode(tokenizer(gloss, add_special_tokens=False)["input_ids"])).strip()
        assert between == alone, "exactly the gloss is replaced by the video"


def test_ids_around_the_video_are_those_of_stage_one_bpe(tokenizer: PreTrainedTokenizerFast) -> None:
    assert_equals_stage_one(tokenizer)
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt=PROMPT))
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in (processor.before_ids, processor.after_ids)]
    assert pieces[0][0] == "<s>" and pieces[0][-1] == ":" and "".join(pieces[1]) == "Ġsentence:"


def test_ids_around_the_video_are_those_of_stage_one_sentencepiece(shared_data: Path) -> None:
    folder = shared_data / "mbart_trimmed_spm"
    if not folder.is_dir():
        pytest.skip(f"no sentencepiece model: {folder} does not exist")
    assert_equals_stage_one(AutoTokenizer.from_pretrained(folder))


def test_training_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt=PROMPT, stride=4))
    batch = processor([9, 4], ["tomorrow it rains", "here"])
    ids_BL, mask_BL = batch["input_ids"], batch["attention_mask"]
    assert (ids_BL == VIDEO_TOKEN_ID).sum(1).tolist() == [3, 1]
    targets = processor.pack([9, 4], ["tomorrow it rains", "here"])["answers"]["targets_N"].tolist()
    for row, text in enumerate(["tomorrow it rains", "here"]):
        answer = tokenizer(" " + text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert targets[: len(answer)] == answer
        targets = targets[len(answer) :]
        real = ids_BL[row][mask_BL[row].bool()]
        assert real[-len(answer) :].tolist() == answer and mask_BL[row].diff().le(0).all(), "right padded"
    assert not targets


def test_a_packed_row_holds_the_padded_rows_without_their_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt=PROMPT, stride=4))
    lengths, texts = [9, 4, 13], ["tomorrow it rains", "here", "I am here in the north"]
    padded, row = processor(lengths, texts), processor.pack(lengths, texts)
    mask_BL, answers = padded["attention_mask"].bool(), row["answers"]
    ids_L = row["input_ids"][0].clone()
    assert ids_L.min() >= 0, "an embedding table can look up every id"
    ids_L[answers["visual_positions_M"]] = VIDEO_TOKEN_ID
    assert torch.equal(ids_L, padded["input_ids"][mask_BL]) and row["input_ids"].shape == (1, len(ids_L))
    borders = answers["packed"]["documents"].borders
    assert (
        borders.diff().tolist() == mask_BL.sum(1).tolist()
        and answers["packed"]["documents"].longest == mask_BL.shape[1]
    )
    assert torch.equal(answers["packed"]["position_ids"][0], torch.cat([torch.arange(int(n)) for n in mask_BL.sum(1)]))
    assert torch.equal(ids_L[answers["label_positions_N"] + 1], answers["targets_N"]), "each place is in front"
    ends = ids_L[borders[1:].long() - 1]
    assert (ends == processor.eos_id).all() and len(answers["targets_N"]) == sum(
        map(len, map(processor.answer_ids, texts))
    )
    with pytest.raises(ValueError, match="2 clips but 1 texts; pass one text per clip"):
        processor.pack([9, 4], ["here"])


def test_generation_batch_is_left_padded_and_has_no_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt=PROMPT))
    batch = processor([9, 4])
    assert set(batch) == {"input_ids", "attention_mask"} and batch["attention_mask"].diff().ge(0).all()
    assert batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist() == processor.prompt_ids(4)


def test_a_real_eos_is_learned_when_it_is_also_the_padding(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(tmp_path, bos_token="<|s|>", eos_token="<|e|>", pad_token="<|e|>")
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt=PROMPT))
    assert processor.pad_id == processor.eos_id
    batch = processor([4, 12], ["here", "tomorrow it rains in the north"])
    eos = batch["input_ids"] == processor.eos_id
    answers = processor.pack([4, 12], ["here", "tomorrow it rains in the north"])["answers"]
    assert (answers["targets_N"] == processor.eos_id).sum() == 2, "one for each answer"
    assert (eos & batch["attention_mask"].bool()).sum(1).tolist() == [1, 1] and eos[0].sum() > 1


def test_no_bos_where_it_is_also_eos(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(tmp_path, bos_token="<|e|>", eos_token="<|e|>")
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt=PROMPT))
    assert processor.eos_id not in processor.prompt_ids(8)


@pytest.mark.parametrize(
    "prompt", ["{video}", "{video} in English:", "translate: {video}", "signs: {video} sentence: "]
)
def test_prompt_shapes(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt=prompt))
    ids = processor.prompt_ids(8)
    assert ids.count(VIDEO_TOKEN_ID) == 2 and ids[0] == tokenizer.bos_token_id
    words = str(tokenizer.decode([i for i in ids[1:] if i != VIDEO_TOKEN_ID]))
    assert words.split() == prompt.replace("{video}", "").split()
    assert tokenizer.convert_ids_to_tokens(processor.answer_ids("here"))[0].startswith("Ġ")


def test_an_answer_that_spells_control_tokens_is_data(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt="<s> signs: {video} </s> sentence:"))
    assert processor.before_ids.count(tokenizer.bos_token_id) == 2, "the prompt's own control tokens are commands"
    assert processor.after_ids.count(processor.eos_id) == 1
    text = "tomorrow </s> it <s> rains"
    answer = processor.answer_ids(text)
    assert answer.count(processor.eos_id) == 1 and processor.decode(torch.tensor([answer])) == [text]
    plain = tokenizer("<s> signs: X </s> sentence: it rains", add_special_tokens=False)["input_ids"]
    assert plain[-len(processor.answer_ids("it rains")) + 1 :] == processor.answer_ids("it rains")[:-1]


def test_frame_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(connector_tokens="frame"))
    assert processor.visual_tokens(9) == 9 and processor.prompt_ids(9).count(VIDEO_TOKEN_ID) == 9


def test_decode_keeps_the_spaces_whatever_the_tokenizer_says(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions())
    ids = processor.answer_ids("rain , is n't it ?")
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    try:
        assert processor.decode(torch.tensor([ids])) == ["rain , is n't it ?"]
    finally:
        tokenizer.clean_up_tokenization_spaces = False


def test_decode_stops_at_the_first_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions())
    answer = processor.answer_ids(TEXT)
    assert processor.decode(torch.tensor([answer + answer, answer + [processor.pad_id] * len(answer)])) == [TEXT, TEXT]


def test_save_and_load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    options = ProcessorOptions(prompt="手语 {video} 句子:", stride=2, image_pixels=96, max_frames=9, frame_stride=3)
    processor = LlavaSltProcessor(tokenizer, options)
    processor.save_pretrained(tmp_path / "out")
    loaded = LlavaSltProcessor.from_pretrained(tmp_path / "out")
    assert loaded.options == options and loaded.prompt_ids(5) == processor.prompt_ids(5)
    assert loaded.answer_ids(TEXT) == processor.answer_ids(TEXT)


@pytest.mark.parametrize("content", [None, "{", "{}", '{"prompt": 1}'])
def test_a_folder_without_a_processor(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="no usable processor config"):
        LlavaSltProcessor.from_pretrained(tmp_path)


def test_unusable_prompts(tmp_path: Path) -> None:
    for prompt in ("no video", "{video} {video}"):
        with pytest.raises(RecipeError, match=r"must contain \{video\} exactly once"):
            ProcessorOptions(prompt=prompt)
    with pytest.raises(RecipeError, match=r"model.connector.tokens: 'both'"):
        ProcessorOptions(connector_tokens="both")
    vocabulary = {"aX": 0, "b": 1, "</s>": 2, "[UNK]": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    joined = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    with pytest.raises(RecipeError, match=r"put a space around \{video\}"):
        LlavaSltProcessor(joined, ProcessorOptions(prompt="a{video} b"))


def test_one_text_per_clip(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="2 clips but 1 texts; pass one text per clip"):
        LlavaSltProcessor(tokenizer, ProcessorOptions())([4, 4], ["one"])


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    def saved(name: str, **special: Any) -> Path:
        bpe_tokenizer(tmp_path / name, **special)
        return tmp_path / name

    folder = saved("no-eos", bos_token="<s>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="defines no eos token"):
        load_tokenizer(llm_config(folder))
    with pytest.raises(RecipeError, match="cannot load a tokenizer from"):
        load_tokenizer(llm_config(tmp_path / "absent"))
    with pytest.raises(RecipeError, match="required with tiny sizes"):
        load_tokenizer(llm_config(folder).model_copy(update={"tokenizer": None}))
