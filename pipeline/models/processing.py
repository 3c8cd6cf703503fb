"""Text around the video: prompt template -> token ids, batches for training and generation, ids -> text.

Spaces. A prompt must tokenise to the ids that stage 1 saw around a gloss, so ids are never made from fragments.
The template is rendered with a stand-in word where the video goes (``signs: X sentence:``), tokenised once as a
whole, and cut at character offsets: what ends before the stand-in is *before*, what begins after it is *after*. The
space in front of a word belongs to that word's token (byte-level BPE and sentencepiece agree on this), hence the
space in front of ``{video}`` goes with the video, and the answer is the tokens of ``" " + text`` after the prompt.
A document or prompt starts with bos if the tokenizer defines one that is not also eos; an answer ends with eos.

Control tokens. The prompt is written by the recipe's author, so a ``<|im_start|>`` in it is that token. An answer is
data, and so is what a prompt shows of a sample: whatever they spell, the only control token of an answer is the end
after it (`shards.text_tokens`).

Cues. What a prompt shows of each sample besides its video (`{language}`, `{previous}`, ...) is given as a mapping from
field to text. In a chat, the prompt is everything in front of the assistant's answer, which follows without a space and
ends as the chat template ends a turn.

Legend: B samples, L text positions, T frames.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config.prompt_schema import PromptsConfig, cues_of, prompt_problem
from pipeline.config.schema import FRAME_STRIDE, IMAGE_PIXELS, MAX_FRAMES, ConnectorConfig, WordLevelConfig
from pipeline.errors import CheckpointError, RecipeError
from pipeline.models.language import bos_id, pad_id
from pipeline.models.llava_slt import VIDEO_TOKEN_ID
from pipeline.models.packed_row import PackedRow, pack_row
from pipeline.models.prompt import STAND_IN, Cues, PromptTemplate
from shards.text_tokens import TextTokens

CONFIG_NAME = "processor_config.json"
VIDEO_FIELD = "{video}"
_REMEMBERED = 1024
"""Prompts whose tokens are kept: those without sentences of their own are few."""


class Prompts(TypedDict):
    """Tokenised prompts, int64 [B, L]."""

    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class ProcessorOptions:
    """What must be stored with the tokenizer so that a folder alone can translate.

    Attributes:
        prompt: template with ``{video}`` once.
        stride: frames per word token of the visual encoder.
        connector_tokens: word | frame.
        image_pixels, max_frames, frame_stride: how stored video becomes the frames the encoder sees.
        video_token_id: placeholder id, one per visual token.
    """

    prompt: str = VIDEO_FIELD
    stride: int = WordLevelConfig().stride
    connector_tokens: str = ConnectorConfig().tokens
    image_pixels: int = IMAGE_PIXELS
    max_frames: int = MAX_FRAMES
    frame_stride: int = FRAME_STRIDE
    video_token_id: int = VIDEO_TOKEN_ID
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """Where the prompt's other fields get their texts from."""
    examples: tuple[tuple[str, str], ...] = ()
    """What `{example}` chooses from: (example as it is shown, the training text in it)."""

    def __post_init__(self) -> None:
        if problem := prompt_problem(self.prompt):
            raise RecipeError(f"connector.prompt: {problem}.")
        if self.connector_tokens not in ("word", "frame"):
            raise RecipeError(f"model.connector.tokens: {self.connector_tokens!r} is not one of word, frame.")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; what only prompts with cues have is left out where it is empty."""
        values = {of.name: getattr(self, of.name) for of in fields(self)}
        prompts = values.pop("prompts").model_dump(exclude_defaults=True)
        examples = [list(example) for example in values.pop("examples")]
        return {**values, **({"prompts": prompts} if prompts else {}), **({"examples": examples} if examples else {})}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ProcessorOptions:
        """Inverse of ``to_dict``. KeyError or ValueError for anything else."""
        optional = ("prompts", "examples")
        values = {of.name: content[of.name] for of in fields(cls) if of.name not in optional}
        examples = tuple((str(shown), str(text)) for shown, text in content.get("examples", []))
        return cls(**values, prompts=PromptsConfig(**content.get("prompts", {})), examples=examples)


class LlavaSltProcessor:
    """Tokenizer + prompt template of an exported model. See the module docstring for how spaces are treated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: ProcessorOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = pad_id(tokenizer)
        self._texts = TextTokens(tokenizer)
        self.template = PromptTemplate.of(tokenizer, options.prompt, options.prompts)
        self.end_id = self._end_id()
        """Ends an answer: eos, or what the chat template ends a turn with."""
        self.cues = cues_of(options.prompt)
        """The fields of the prompt besides its video."""
        self._remembered: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
        self.before_ids, self.after_ids = self.around_video(dict.fromkeys(self.cues, STAND_IN))
        self._head_text = self._head()

    def __call__(
        self, frame_lengths: Sequence[int], texts: Sequence[str] | None = None, cues: Sequence[Cues] | None = None
    ) -> Prompts:
        """A batch for clips of these lengths in frames (as the encoder will see them).

        ``cues``: per clip the texts of the prompt's other fields, where it has any.
        With ``texts``: prompts followed by their answers and eos, right padded, for logits. Without: left padded
        prompts for `generate`. Masks come from lengths, so an eos that shares its id with padding is still seen.
        """
        prompts = self._prompts(frame_lengths, cues)
        if texts is None:
            return self._pad(prompts, left=True)
        answers = self._answers(prompts, texts)
        return self._pad([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], left=False)

    def pack(self, frame_lengths: Sequence[int], texts: Sequence[str], cues: Sequence[Cues] | None = None) -> PackedRow:
        """Clips of these lengths in frames with their texts as one row to train on: no padding, every sample a causal
        document of its own, and only answers and their eos are learned."""
        prompts = self._prompts(frame_lengths, cues)
        return pack_row(prompts, self._answers(prompts, texts), self.options.video_token_id)

    def with_examples(self, examples: Sequence[tuple[str, str]]) -> LlavaSltProcessor:
        """The same processor with what `{example}` chooses from."""
        return LlavaSltProcessor(self.tokenizer, replace(self.options, examples=tuple(examples)))

    def stand_ins(self, count: int) -> list[Cues]:
        """Cues of clips without a sample, as those of a probe: a word in every field."""
        return [dict.fromkeys(self.cues, STAND_IN)] * count

    def visual_tokens(self, frames: int) -> int:
        """Placeholders for a clip of ``frames`` frames: ceil(frames / stride), or frames for connector_tokens=frame."""
        return frames if self.options.connector_tokens == "frame" else -(-frames // self.options.stride)

    def prompt_ids(self, frames: int, cues: Cues | None = None) -> list[int]:
        """bos?, text before, placeholders, text after. Without cues, a word stands in each of their fields."""
        before, after = (self.before_ids, self.after_ids) if cues is None else self.around_video(cues)
        return before + [self.options.video_token_id] * self.visual_tokens(frames) + after

    def around_video(self, cues: Cues) -> tuple[list[int], list[int]]:
        """Ids in front of the video, bos included, and behind it, with these cues. KeyError without one of them."""
        key = tuple(cues[name] for name in self.cues)
        if key not in self._remembered:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = self._cut_prompt(cues)
        return self._remembered[key]

    def answer_ids(self, text: str) -> list[int]:
        """Tokens of ``" " + text`` (in a chat: of ``text``) as they follow the prompt, then its end."""
        space = "" if self.template.chat else " "
        tokens = self._texts.behind(self._head_text, f"{space}{text.strip()}")
        first = tokens.own.index(True) if True in tokens.own else len(tokens.ids)
        return [*tokens.ids[first:], self.end_id]

    def decode(self, ids_BL: Tensor, end_ids: Sequence[int] = ()) -> list[str]:
        """New tokens of `generate` -> texts: cut at the first eos or other id of ``end_ids``, special tokens dropped,
        outer spaces stripped; spaces inside stay as they are, whatever the tokenizer's own setting."""
        ends, texts = {self.eos_id, self.end_id, *end_ids}, []
        for row in ids_BL.tolist():
            kept = list(itertools.takewhile(lambda token: token not in ends, row))
            text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            texts.append(str(text).strip())
        return texts

    def _prompts(self, frame_lengths: Sequence[int], cues: Sequence[Cues] | None) -> list[list[int]]:
        if cues is None and self.cues:
            shown = ", ".join(f"{{{name}}}" for name in self.cues)
            raise ValueError(f"the prompt shows {shown}; pass the cues of every clip.")
        cues = [{}] * len(frame_lengths) if cues is None else cues
        return [self.prompt_ids(length, of) for length, of in zip(frame_lengths, cues, strict=True)]

    def _answers(self, prompts: Sequence[list[int]], texts: Sequence[str]) -> list[list[int]]:
        if len(texts) != len(prompts):
            raise ValueError(f"{len(prompts)} clips but {len(texts)} texts; pass one text per clip.")
        return [self.answer_ids(text) for text in texts]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer files and processor_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        content = {"processor_class": type(self).__name__, **self.options.to_dict()}
        (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LlavaSltProcessor:
        """Reads a folder written by `save_pretrained`. Raises CheckpointError when it is not one."""
        path = Path(folder) / CONFIG_NAME
        try:
            options = ProcessorOptions.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path}: no usable processor config ({type(error).__name__}: {error}). Give a folder written by"
                " `slt export`, which holds the tokenizer and processor_config.json beside the weights."
            ) from error
        return cls(AutoTokenizer.from_pretrained(folder), options)

    def _cut_prompt(self, cues: Cues) -> tuple[list[int], list[int]]:
        parts = self.template.filled(cues)
        found = self._texts.joined([(part.text, part.data) for part in parts])
        rendered, ids, offsets = found.text, found.ids, found.offsets
        start, end = next(bounds for bounds, part in zip(found.bounds, parts, strict=True) if part.video)
        before = rendered[:start]
        # A token may span stand-in and neighbouring spaces, never neighbouring text.
        inner = [i for i, (a, b) in enumerate(offsets) if b > start and a < end]
        for place in inner:
            a, b = offsets[place]
            if rendered[a:start].strip() or rendered[end:b].strip():
                raise RecipeError(
                    f"connector.prompt: {self.options.prompt!r}: this tokenizer joins {VIDEO_FIELD} with the text"
                    f" beside it into one token ({rendered[a:b]!r}); put a space around {VIDEO_FIELD}."
                )
        # A chat template writes the beginning itself, if there is one.
        bos = None if self.template.chat else bos_id(self.tokenizer)
        # A lone space token in front of the stand-in is that word's space (sentencepiece may split it off).
        blank = " " if self.template.chat else None  # a line break of the chat template stays
        lead = [
            i
            for i in range(inner[0])
            if rendered[slice(*offsets[i])].strip(blank) or offsets[i][1] < len(before.rstrip(blank))
        ]
        return [*([] if bos is None else [bos]), *(ids[i] for i in lead)], ids[inner[-1] + 1 :]

    def _head(self) -> str:
        """The rendered prompt that precedes an answer, with a word in every field. Raises RecipeError for a chat
        template whose end the tokenizer joins with the answer."""
        head = "".join(part.text for part in self.template.filled(dict.fromkeys(self.cues, STAND_IN)))
        if not self.template.chat:
            return head
        alone = self._texts.joined([(head, False)]).ids
        if self._texts.joined([(head + STAND_IN, False)]).ids[: len(alone)] != alone:
            raise RecipeError(
                "connector.prompts.chat: this tokenizer joins the end of its chat template with the answer into one"
                " token; set chat to false and write the turns into connector.prompt."
            )
        return head

    def _end_id(self) -> int:
        ids = self._texts.joined([(self.template.end, False)]).ids if self.template.end else []
        return ids[0] if ids and ids[0] in self._texts.controls else self.eos_id

    def _pad(self, rows: list[list[int]], left: bool) -> Prompts:
        longest = max(map(len, rows))
        ids_BL = torch.full((len(rows), longest), self.pad_id)
        mask_BL = torch.zeros(len(rows), longest, dtype=torch.long)
        for place, row in enumerate(rows):
            where = slice(longest - len(row), None) if left else slice(len(row))
            ids_BL[place, where] = torch.tensor(row)
            mask_BL[place, where] = 1
        return {"input_ids": ids_BL, "attention_mask": mask_BL}
