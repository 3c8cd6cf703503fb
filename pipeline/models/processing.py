"""Text around the video: prompt template -> token ids, batches for training and generation, ids -> text.

Spaces. A prompt must tokenise to the ids that stage 1 saw around a gloss, so ids are never made from fragments.
The template is rendered with a stand-in word where the video goes (``signs: X sentence:``), tokenised once as a
whole, and cut at character offsets: what ends before the stand-in is *before*, what begins after it is *after*. The
space in front of a word belongs to that word's token (byte-level BPE and sentencepiece agree on this), hence the
space in front of ``{video}`` goes with the video, and the answer is the tokens of ``" " + text`` after the prompt.
A document or prompt starts with bos if the tokenizer defines one that is not also eos; an answer ends with eos.

Control tokens. The prompt is written by the recipe's author, so a ``<|im_start|>`` in it is that token. An answer is
data: whatever it spells, its only control token is the eos after it (`shards.text_tokens`).

Legend: B samples, L text positions, T frames.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config.schema import FRAME_STRIDE, IMAGE_PIXELS, MAX_FRAMES, ConnectorConfig, WordLevelConfig
from pipeline.errors import CheckpointError, RecipeError
from pipeline.models.language import bos_id, pad_id
from pipeline.models.llava_slt import VIDEO_TOKEN_ID
from pipeline.models.packed_row import PackedRow, pack_row
from shards.text_tokens import TextTokens

CONFIG_NAME = "processor_config.json"
VIDEO_FIELD = "{video}"
STAND_IN = "X"
"""Rendered in place of the video while the template is tokenised; its tokens are dropped."""


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

    def __post_init__(self) -> None:
        if self.prompt.count(VIDEO_FIELD) != 1:
            raise RecipeError(
                f"connector.prompt: {self.prompt!r} must contain {VIDEO_FIELD} exactly once; it marks where the visual"
                " tokens go."
            )
        if self.connector_tokens not in ("word", "frame"):
            raise RecipeError(f"model.connector.tokens: {self.connector_tokens!r} is not one of word, frame.")


class LlavaSltProcessor:
    """Tokenizer + prompt template of an exported model. See the module docstring for how spaces are treated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: ProcessorOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = pad_id(tokenizer)
        self._texts = TextTokens(tokenizer)
        self.before_ids, self.after_ids = self._cut_prompt()

    def __call__(self, frame_lengths: Sequence[int], texts: Sequence[str] | None = None) -> Prompts:
        """A batch for clips of these lengths in frames (as the encoder will see them).

        With ``texts``: prompts followed by their answers and eos, right padded, for logits. Without: left padded
        prompts for `generate`. Masks come from lengths, so an eos that shares its id with padding is still seen.
        """
        prompts = [self.prompt_ids(length) for length in frame_lengths]
        if texts is None:
            return self._pad(prompts, left=True)
        answers = self._answers(prompts, texts)
        return self._pad([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], left=False)

    def pack(self, frame_lengths: Sequence[int], texts: Sequence[str]) -> PackedRow:
        """Clips of these lengths in frames with their texts as one row to train on: no padding, every sample a causal
        document of its own, and only answers and their eos are learned."""
        prompts = [self.prompt_ids(length) for length in frame_lengths]
        return pack_row(prompts, self._answers(prompts, texts), self.options.video_token_id)

    def visual_tokens(self, frames: int) -> int:
        """Placeholders for a clip of ``frames`` frames: ceil(frames / stride), or frames for connector_tokens=frame."""
        return frames if self.options.connector_tokens == "frame" else -(-frames // self.options.stride)

    def prompt_ids(self, frames: int) -> list[int]:
        """bos?, text before, placeholders, text after."""
        return self.before_ids + [self.options.video_token_id] * self.visual_tokens(frames) + self.after_ids

    def answer_ids(self, text: str) -> list[int]:
        """Tokens of ``" " + text`` as they follow the prompt, then eos."""
        tokens = self._texts.behind(self._head(), f" {text.strip()}")
        first = tokens.own.index(True) if True in tokens.own else len(tokens.ids)
        return [*tokens.ids[first:], self.eos_id]

    def decode(self, ids_BL: Tensor, end_ids: Sequence[int] = ()) -> list[str]:
        """New tokens of `generate` -> texts: cut at the first eos or other id of ``end_ids``, special tokens dropped,
        outer spaces stripped; spaces inside stay as they are, whatever the tokenizer's own setting."""
        ends, texts = {self.eos_id, *end_ids}, []
        for row in ids_BL.tolist():
            kept = list(itertools.takewhile(lambda token: token not in ends, row))
            text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            texts.append(str(text).strip())
        return texts

    def _answers(self, prompts: Sequence[list[int]], texts: Sequence[str]) -> list[list[int]]:
        if len(texts) != len(prompts):
            raise ValueError(f"{len(prompts)} clips but {len(texts)} texts; pass one text per clip.")
        return [self.answer_ids(text) for text in texts]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer files and processor_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        content = {"processor_class": type(self).__name__, **asdict(self.options)}
        (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LlavaSltProcessor:
        """Reads a folder written by `save_pretrained`. Raises CheckpointError when it is not one."""
        path = Path(folder) / CONFIG_NAME
        try:
            content = json.loads(path.read_text())
            options = ProcessorOptions(**{field.name: content[field.name] for field in fields(ProcessorOptions)})
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path}: no usable processor config ({type(error).__name__}: {error}). Give a folder written by"
                " `slt export`, which holds the tokenizer and processor_config.json beside the weights."
            ) from error
        return cls(AutoTokenizer.from_pretrained(folder), options)

    def _cut_prompt(self) -> tuple[list[int], list[int]]:
        before, after = self.options.prompt.split(VIDEO_FIELD)
        rendered = f"{before}{STAND_IN}{after.rstrip()}"
        start, end = len(before), len(before) + len(STAND_IN)
        encoded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
        # A token may span stand-in and neighbouring spaces, never neighbouring text.
        inner = [i for i, (a, b) in enumerate(offsets) if b > start and a < end]
        for place in inner:
            a, b = offsets[place]
            if rendered[a:start].strip() or rendered[end:b].strip():
                raise RecipeError(
                    f"connector.prompt: {self.options.prompt!r}: this tokenizer joins {VIDEO_FIELD} with the text"
                    f" beside it into one token ({rendered[a:b]!r}); put a space around {VIDEO_FIELD}."
                )
        bos = bos_id(self.tokenizer)
        # A lone space token in front of the stand-in is that word's space (sentencepiece may split it off).
        lead = [
            i for i in range(inner[0]) if rendered[slice(*offsets[i])].strip() or offsets[i][1] < len(before.rstrip())
        ]
        return [*([] if bos is None else [bos]), *(ids[i] for i in lead)], ids[inner[-1] + 1 :]

    def _head(self) -> str:
        """The rendered prompt that precedes an answer."""
        return self.options.prompt.replace(VIDEO_FIELD, STAND_IN).rstrip()

    def _pad(self, rows: list[list[int]], left: bool) -> Prompts:
        longest = max(map(len, rows))
        ids_BL = torch.full((len(rows), longest), self.pad_id)
        mask_BL = torch.zeros(len(rows), longest, dtype=torch.long)
        for place, row in enumerate(rows):
            where = slice(longest - len(row), None) if left else slice(len(row))
            ids_BL[place, where] = torch.tensor(row)
            mask_BL[place, where] = 1
        return {"input_ids": ids_BL, "attention_mask": mask_BL}
