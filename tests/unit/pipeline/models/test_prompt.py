"""Prompts as data: fields, chat templates, what a sample spells, and the same ids from an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.config.prompt_schema import PromptsConfig
from pipeline.errors import RecipeError
from pipeline.models.llava_slt import VIDEO_TOKEN_ID
from pipeline.models.processing import CONFIG_NAME, LlavaSltProcessor, ProcessorOptions
from pipeline.models.prompt import PromptTemplate, example_text, language_name, value_of
from shards.errors import DataError
from tests.unit.pipeline.models.tiny import bpe_tokenizer

PROMPT = "in {language} after {previous} signs: {video} sentence:"
CUES = [
    {"language": "German", "previous": "tomorrow it rains"},
    {"language": "English", "previous": ""},
    {"language": "German", "previous": "I am here </s> <s> in the north"},
]
TEXTS = ["tomorrow it rains", "here", "I am here in the north"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{{ message['content'] | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return bpe_tokenizer(tmp_path)


def instruct(folder: Path, template: str = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = bpe_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def processor_of(tokenizer: Any, prompt: str = PROMPT, **prompts: Any) -> LlavaSltProcessor:
    return LlavaSltProcessor(tokenizer, ProcessorOptions(prompt=prompt, stride=4, prompts=PromptsConfig(**prompts)))


def test_a_prompt_with_cues_has_the_ids_of_the_prompt_that_spells_them(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = processor_of(tokenizer)
    for cues, spelled in ((CUES[0], "in German after tomorrow it rains"), (CUES[1], "in English after")):
        plain = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt=f"{spelled} signs: {{video}} sentence:", stride=4))
        assert processor.prompt_ids(9, cues) == plain.prompt_ids(9)
        assert processor.answer_ids("it rains") == plain.answer_ids("it rains")


def test_a_packed_row_with_cues_equals_each_sample_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    processor, lengths = processor_of(tokenizer), [9, 4, 13]
    row, padded = processor.pack(lengths, TEXTS, CUES), processor(lengths, TEXTS, CUES)
    ids_L = row["input_ids"][0].clone()
    ids_L[row["answers"]["visual_positions_M"]] = VIDEO_TOKEN_ID
    begin, targets = 0, row["answers"]["targets_N"].tolist()
    for number, (length, text, cues) in enumerate(zip(lengths, TEXTS, CUES, strict=True)):
        alone = processor.pack([length], [text], [cues])
        count, answer = alone["input_ids"].shape[1], alone["answers"]["targets_N"].tolist()
        whole = ids_L[begin : begin + count]
        assert torch.equal(whole, padded["input_ids"][number][padded["attention_mask"][number].bool()])
        assert targets[: len(answer)] == answer == processor.answer_ids(text)
        places = row["answers"]["label_positions_N"]
        mine = places[(places >= begin) & (places < begin + count)] - begin
        assert torch.equal(mine, alone["answers"]["label_positions_N"]), "only answers are learned"
        targets, begin = targets[len(answer) :], begin + count
    assert begin == len(ids_L) and not targets


def test_what_a_cue_spells_is_no_command(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = processor_of(tokenizer, "<s> after {previous} signs: {video} sentence:")
    ids = processor.prompt_ids(4, {"previous": "I am here </s> <s> in the north"})
    assert ids.count(tokenizer.bos_token_id) == 2 and processor.eos_id not in ids, "bos, and the author's own"
    assert "</s>" in tokenizer.decode(ids[:-8]).replace(" ", "") or "<" in tokenizer.decode(ids)


def test_a_prompt_with_cues_asks_for_them(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"the prompt shows \{language\}, \{previous\}; pass the cues of every clip"):
        processor_of(tokenizer)([4])


def test_an_export_makes_the_same_ids(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    prompts = PromptsConfig(languages={"de": "German"}, previous={"count": 2, "empty": "-"})  # type: ignore[arg-type]
    options = ProcessorOptions(prompt=PROMPT, prompts=prompts, examples=(("signs: A", "a"), ("B ü", "b")))
    processor = LlavaSltProcessor(tokenizer, options)
    processor.save_pretrained(tmp_path / "export")
    loaded = LlavaSltProcessor.from_pretrained(tmp_path / "export")
    assert loaded.options == options and loaded.prompt_ids(5, CUES[2]) == processor.prompt_ids(5, CUES[2])
    chat = processor_of(instruct(tmp_path), "translate to {language}: {video}", chat=True)
    chat.save_pretrained(tmp_path / "chat")
    again = LlavaSltProcessor.from_pretrained(tmp_path / "chat")
    assert again.prompt_ids(5, CUES[0]) == chat.prompt_ids(5, CUES[0]) and again.answer_ids("a") == chat.answer_ids("a")


def test_a_prompt_without_cues_is_exported_as_before(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    LlavaSltProcessor(tokenizer, ProcessorOptions(prompt="signs: {video}")).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert set(stored) == {
        "processor_class", "prompt", "stride", "connector_tokens", "image_pixels", "max_frames", "frame_stride",
        "video_token_id",
    }  # fmt: skip


@pytest.mark.parametrize("system", ["", "you translate signs"])
def test_a_chat_is_that_of_the_tokenizer_with_the_video_in_the_users_turn(tmp_path: Path, system: str) -> None:
    tokenizer = instruct(tmp_path)
    processor = processor_of(tokenizer, "{video} to {language}", chat=True, system=system)
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": "X to German"}, {"role": "assistant", "content": "it rains"}]
    theirs = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    stand_in = tokenizer("X", add_special_tokens=False)["input_ids"]
    prompt = processor.prompt_ids(4, {"language": "German"})
    where = prompt.index(VIDEO_TOKEN_ID)
    ours = [*prompt[:where], *stand_in, *prompt[where + 1 :], *processor.answer_ids(" it rains ")]
    assert ours == theirs[: len(ours)] and tokenizer.decode(theirs[len(ours) :]).strip() == ""
    assert processor.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>") != processor.eos_id
    answer = torch.tensor([[*processor.answer_ids("it rains"), *processor.answer_ids("more")]])
    assert processor.decode(answer) == ["it rains"], "generation ends where the turn ends"


def test_a_chat_template_that_ends_in_text_ends_with_eos(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}assistant: "
    )
    processor = processor_of(instruct(tmp_path, template), "{video}", chat=True)
    assert processor.end_id == processor.eos_id


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "the tokenizer of model.llm has no chat template: it is no instruct model's"),
        ("{{ raise_exception('no such role') }}", r"chat template refuses a user turn \(.*no such role"),
        ("{% for message in messages %}user: {% endfor %}", "does not show the user's turn as it is, once"),
        ("{{ messages[0]['content'] * 2 }}", "does not show the user's turn as it is, once"),
        ("{{ messages[0]['content'] }} th", "joins the end of its chat template with the answer"),
    ],
)
def test_chat_templates_that_cannot_be_used(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = instruct(tmp_path, template)
    if " th" in template:
        message, tokenizer = message, _joining(tokenizer)
    with pytest.raises(RecipeError, match=message):
        processor_of(tokenizer, "{video}", chat=True)


def _joining(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens(["thX"])
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{vidoe} {video}", r"\{vidoe\} is no field; did you mean \{video\}\?"),
        ("{mood} {video}", r"\{mood\} is no field: \{video\}, \{language\}, "),
        ("{video} {language} {language}", r"contains \{language\} more than once"),
        ("{language}", r"must contain \{video\} exactly once"),
    ],
)
def test_prompts_that_cannot_be_used(tokenizer: PreTrainedTokenizerFast, prompt: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"connector.prompt: .*{message}"):
        processor_of(tokenizer, prompt)
    with pytest.raises(RecipeError, match=f"connector.prompt: .*{message}"):
        PromptTemplate.of(tokenizer, prompt, PromptsConfig())


def test_an_empty_cue_leaves_no_double_space(tokenizer: PreTrainedTokenizerFast) -> None:
    def text(prompt: str, **cues: str) -> str:
        return "".join(part.text for part in PromptTemplate.of(tokenizer, prompt, PromptsConfig()).filled(cues))

    assert text("a {previous} b {video} c", previous="") == "a b X c"
    assert text("{previous} b {video}", previous=" ") == "b X"
    assert text("{video} {gloss}{previous} c", previous="", gloss=" G ") == "X G c"


def test_names_and_values_of_cues() -> None:
    prompts = PromptsConfig(languages={"de": "German", "en": "English"})
    assert language_name("language", "de", prompts, "s") == "German"
    assert language_name("sign_language", "gsg", prompts, "s") == "gsg"
    with pytest.raises(DataError, match=r"set:3: the language 'fr' has no name\n  fix: add `fr: NAME` to"):
        language_name("language", "fr", prompts, "set:3")
    with pytest.raises(DataError, match=r"shows \{sign_language\}, but the sign_language is not known"):
        language_name("sign_language", "", prompts, "s")
    assert value_of("previous", ["a ", " b"], {}, "s") == "a b" and value_of("gloss", [], {"gloss": "-"}, "s") == "-"
    with pytest.raises(DataError, match=r"set:3: connector.prompt shows \{previous\}, but there is none\n  fix: give"):
        value_of("previous", ["", " "], {}, "set:3")
    assert example_text("{gloss} = {text}", " it rains ", "RAIN") == "RAIN = it rains"
