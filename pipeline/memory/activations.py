"""Bytes of activations, losses and caches of one micro-batch, for the largest batch the recipe allows.

Language models and frame backbones run on the meta device (`trace`), with an attention that stores what fused kernels
store (`stand_in`); so any architecture counts as it is, frozen or trained, with recomputation or without it. What
grows with rows of one width is counted by hand:

- a block of the word or sentence level keeps 18 numbers of its width per row: two norms with their inputs, queries,
  keys, values, attention output, and the feed-forward layer at four times the width before and after GELU (the count
  of arXiv 2205.05198, section 4.1, without scores and dropout masks);
- logits of one chunk: in the model's precision, in fp32, and their gradient in fp32;
- keys and values of generation: two per layer, token and beam (arXiv 2211.05102, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.prompt_schema import cues_of
from pipeline.config.schema import TILE_MIB, ConnectorStageConfig, Recipe
from pipeline.memory.lines import BACKWARD, ENCODING, GENERATION, START, Line
from pipeline.memory.parts import Parts
from pipeline.memory.trace import peak_bytes
from pipeline.models.llava_slt import LlavaSltConfig
from pipeline.models.recompute import checkpoint_gradients, recomputed_layers, share_of

_BACKWARD = frozenset({BACKWARD})
_BLOCK_NUMBERS = 18
_FRAMES_TRACED = 4
_TEXT_TOKENS = 64  # the longest caption of a contrastive batch that is counted
_SENTENCE_TOKENS = 64  # of each sentence that a prompt shows besides the video
_TILE_COPIES = 8  # of a tile of token similarities while its gradient is made
_FRAME_FIELDS = ("train.micro_batch", "data.max_frames", "data.frame_stride")


def activation_lines(recipe: Recipe, parts: Parts) -> list[Line]:
    """What a micro-batch takes beside the weights."""
    rule = {"continued_pretraining": _packs, "contrastive": _contrastive}.get(recipe.stage, _translation)
    return [line for line in rule(recipe, parts) if line.bytes]


def clip_frames(recipe: Recipe, stride: int) -> int:
    """Frames of the largest micro-batch; ``stride`` of them are one token of the language model."""
    data = recipe.data
    each = data.frame_budget or data.max_frames
    if data.pack_tokens:  # of the packed tokens at least the words are there
        each = max(each, data.pack_tokens * stride)
    return recipe.train.micro_batch * each


def frames_per_pass(recipe: Recipe, parts: Parts) -> int:
    """Frames of one call of the backbone, by the recipe or by the exported encoder; 0 = all."""
    section = recipe.model.visual
    backbone = None if section is None else section.backbone
    return int(parts.visual.config.frames_per_pass) if backbone is None else backbone.frames_per_pass


# -- language ----------------------------------------------------------------------------------------------------
def llm_bytes(llm: Any, tokens: int, recompute: float, offload: bool = False) -> int:
    """Most bytes that forward and backward of a language model hold at once for so many packed tokens, without its
    head, the gradients of its weights and its input.

    Args:
        llm: a causal LM on the meta device that uses `stand_in.KEY`.
        tokens: positions of the micro-batch, in one row.
        recompute: `model.gradient_checkpointing`, the share of recomputed layers.
        offload: the inputs of layers wait in host memory (`pipeline.models.offload`), but for the one at work.
    """
    checkpoint_gradients(llm, recompute)
    llm.train()
    width, dtype = llm.config.get_text_config().hidden_size, next(llm.parameters()).dtype
    embeds_BLE = torch.empty(1, tokens, width, dtype=dtype, device="meta", requires_grad=True)

    def run() -> None:
        hidden_BLE = llm.get_decoder()(inputs_embeds=embeds_BLE, use_cache=False).last_hidden_state
        hidden_BLE.backward(torch.empty_like(hidden_BLE))

    recomputed = recomputed_layers(llm.config.get_text_config().num_hidden_layers, recompute)
    away = max(recomputed - 1, 0) * embeds_BLE.nbytes if offload else 0
    return _traced(llm, run, [embeds_BLE]) - away


def _traced(module: nn.Module, run: Any, inputs: list[Tensor]) -> int:
    """`peak_bytes` with every weight's gradient dropped as soon as it is complete: `zero` counts those."""
    handles = [
        parameter.register_post_accumulate_grad_hook(_drop)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    try:
        return peak_bytes(run, [*module.parameters(), *module.buffers(), *inputs])
    finally:
        for handle in handles:
            handle.remove()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _head(recipe: Recipe, llm: Any, tokens: int, trains: bool) -> Iterator[Line]:
    config, size = llm.config.get_text_config(), next(llm.parameters()).element_size()
    own = recipe.stage == "continued_pretraining"  # only this stage reads its setting
    chunk = min(recipe.continued_pretraining.loss_chunk_tokens if own else LlavaSltConfig.loss_chunk_tokens, tokens)
    logits = chunk * config.vocab_size * (size + 4 + 4)
    rule = f"{chunk} rows of {config.vocab_size} logits: in the model's precision, in fp32, and their gradient"
    fields = ("continued_pretraining.loss_chunk_tokens",) if own else ()
    yield Line("logits of one chunk", logits, rule, _BACKWARD, fields)
    gradients = tokens * config.hidden_size + (config.vocab_size * config.hidden_size if trains else 0)
    rule = "computed in forward: of the last hidden states" + (" and of the head" if trains else "")
    yield Line("gradients of the loss", gradients * size, rule, _BACKWARD)


def _llm(recipe: Recipe, parts: Parts, tokens: int, fields: tuple[str, ...]) -> Iterator[Line]:
    recompute, offload = share_of(recipe.model), _offloads(recipe)
    kind = "llm, inputs in host memory" if offload else "llm"
    if (kind, recompute) not in parts.traced:
        parts.traced[kind, recompute] = (llm_bytes(parts.llm, tokens, recompute, offload), tokens)
    traced, tokens_traced = parts.traced[kind, recompute]
    size = traced * tokens // tokens_traced
    trains = any(parameter.requires_grad for parameter in parts.llm.parameters())
    how = how_recomputed(recompute)
    how += ", their inputs in host memory" if offload else ""
    passes = "" if trains else ", the model frozen and gradients passing through"
    rule = f"{tokens} tokens, {how}{passes}"
    yield Line("activations of the LLM", size, rule, _BACKWARD, ("model.gradient_checkpointing", *fields))
    head = any(parameter.requires_grad for parameter in parts.llm.get_output_embeddings().parameters())
    yield from _head(recipe, parts.llm, tokens, head)


def how_recomputed(share: float) -> str:
    """A share of recomputed layers in words."""
    return "all layers kept" if not share else "every layer recomputed" if share == 1 else f"{share:.0%} recomputed"


def _offloads(recipe: Recipe) -> bool:
    return recipe.stage == "continued_pretraining" and recipe.continued_pretraining.offload_activations


def _packs(recipe: Recipe, parts: Parts) -> Iterator[Line]:
    tokens = recipe.train.micro_batch * recipe.data.block_tokens // recipe.train.sequence_parallel
    fields = (
        "train.micro_batch", "data.block_tokens", "continued_pretraining.mlp_chunk_tokens",
        "continued_pretraining.offload_activations", "train.sequence_parallel",
    )  # fmt: skip
    yield from _llm(recipe, parts, tokens, fields)


# -- video -------------------------------------------------------------------------------------------------------
def backbone_bytes(parts: Parts, frames: int, per_pass: int, recompute: float) -> int:
    """Most bytes that the frame backbone holds at once: what backward needs of all frames, and one pass at work.

    Both come from two traces, of one pass of a few frames and of two.
    """
    if ("backbone", recompute) not in parts.traced:
        parts.visual.train()
        checkpoint_gradients(parts.visual, recompute)
        parts.traced["backbone", recompute] = (_passes(parts, 1), _passes(parts, 2))
    one, two = parts.traced["backbone", recompute]
    kept, at_work = two - one, one - (two - one)
    traced = parts.visual.config.clip_sizes().clip_frames or _FRAMES_TRACED
    return (kept * frames + at_work * min(per_pass or frames, frames)) // traced


def _passes(parts: Parts, passes: int) -> int:
    backbone = parts.visual.backbone
    side = backbone.image_pixels
    shape: tuple[int, ...] = (_FRAMES_TRACED, 3, side, side)
    if frames := parts.visual.config.clip_sizes().clip_frames:  # one window, counted as so many frames below
        shape = (1, frames, 3, side, side)
    pixels = [torch.empty(shape, dtype=parts.dtype, device="meta") for _ in range(passes)]

    def run() -> None:
        with torch.set_grad_enabled(backbone.trains):
            kept = [backbone(part) for part in pixels]
            if backbone.trains:
                torch.cat(kept).sum().backward()

    return _traced(backbone, run, pixels)


def _frames(recipe: Recipe, parts: Parts, trains: bool) -> Iterator[Line]:
    """Frames and encoder. What a frozen encoder makes is gone before the language model begins, but for the frames."""
    visual = parts.visual
    frames = clip_frames(recipe, _stride(recipe, parts))
    size = 2 if parts.dtype == torch.bfloat16 else 4
    phases = _BACKWARD if trains else frozenset({ENCODING, GENERATION})
    if visual.config.backbone_config is not None:
        yield from _images(recipe, parts, frames, phases)
    yield from _rows(parts, frames, phases | _BACKWARD)
    config = visual.config
    words = frames // config.stride
    blocks = frames * config.word_layers + words * config.sentence_layers
    rule = f"{_BLOCK_NUMBERS} numbers of width {config.width} per row{' and block' if trains else ''}"
    rows = (blocks if trains else frames) * config.width
    yield Line("word and sentence level", _BLOCK_NUMBERS * rows * size, rule, phases, _FRAME_FIELDS)


def _rows(parts: Parts, frames: int, phases: frozenset[str]) -> Iterator[Line]:
    """Stored rows that are the whole input, or keypoints: their numbers, and what the pose level makes of them."""
    config, size = parts.visual.config, 2 if parts.dtype == torch.bfloat16 else 4
    numbers = config.pose_channels + (config.features_width if config.backbone_config is None else 0)
    # shape, confidences, middle and size in fp32; then a hidden layer before and after GELU and the output per group
    hidden = 3 * len(config.pose_groups) * config.pose_width
    rule = f"{frames} rows of {numbers} numbers as float16 and in the model's precision"
    rule += f", the pose level with {hidden} numbers" if hidden else ""
    total = frames * (numbers * (2 + size) + 2 * config.pose_channels * 4 + hidden * size)
    yield Line("stored rows", total if numbers else 0, rule, phases, _FRAME_FIELDS)


def _images(recipe: Recipe, parts: Parts, frames: int, phases: frozenset[str]) -> Iterator[Line]:
    visual, recompute, side = parts.visual, share_of(recipe.model), recipe.data.image_pixels
    size = 2 if parts.dtype == torch.bfloat16 else 4
    per_pass = frames_per_pass(recipe, parts)
    numbers = 3 * side * side
    rule = f"{frames} frames of {side} x {side} as bytes"
    yield Line("frames", frames * numbers, rule, phases | _BACKWARD, (*_FRAME_FIELDS, "data.image_pixels"))
    fields = ("model.visual.backbone.frames_per_pass", "model.gradient_checkpointing", *_FRAME_FIELDS)
    at_once = min(per_pass or frames, frames)
    # a trained backbone keeps its inputs until backward
    floats = at_once * numbers * 4 + (frames if visual.backbone.trains else at_once) * numbers * size
    rule = f"{at_once} frames in fp32, and in the model's precision"
    yield Line("frames, normalised", floats, rule, phases, fields)
    how = how_recomputed(recompute) if visual.backbone.trains else "frozen"
    rule = f"{frames} frames, {per_pass or 'all'} per pass, {how}"
    yield Line("frame backbone", backbone_bytes(parts, frames, per_pass, recompute), rule, phases, fields)


def most_sentences(config: ConnectorStageConfig) -> int:
    """Sentences that the prompt may show of other samples, a gloss included."""
    shown, prompts = cues_of(config.prompt), config.prompts
    counts = {"previous": prompts.previous.count, "gloss": 1, "example": prompts.example.count}
    return sum(counts.get(name, 0) for name in shown)


def _translation(recipe: Recipe, parts: Parts) -> Iterator[Line]:
    yield from _frames(recipe, parts, trains=any(p.requires_grad for p in parts.visual.parameters()))
    micro, stride, packed = recipe.train.micro_batch, _stride(recipe, parts), recipe.data.pack_tokens
    tokens = -(-clip_frames(recipe, stride) // stride) + micro
    # a prompt has hardly more tokens than half its characters
    prompt = len(recipe.connector.prompt) // 2 + _SENTENCE_TOKENS * most_sentences(recipe.connector)
    answers = micro * (prompt + recipe.connector.max_new_tokens)
    in_row = (micro * packed if packed else tokens + answers) * _candidates(recipe)
    own = ("sequence_tuning.samples",) if recipe.stage == "sequence_tuning" else ()
    yield from _llm(recipe, parts, in_row, ("data.pack_tokens", *own, *_FRAME_FIELDS))
    size = 2 if parts.dtype == torch.bfloat16 else 4
    hidden = tokens * recipe.model.connector.hidden * 3 * size
    yield Line("connector", hidden, f"{tokens} tokens, before and after GELU", _BACKWARD, _FRAME_FIELDS)
    yield _cache(recipe, parts.llm, tokens + answers, size)


def _candidates(recipe: Recipe) -> int:
    """Texts behind the same clip in a row: when whole translations are compared, each of them."""
    config = recipe.sequence_tuning
    return config.samples + config.with_reference if recipe.stage == "sequence_tuning" else 1


def _stride(recipe: Recipe, parts: Parts) -> int:
    return parts.visual.config.stride if recipe.model.connector.tokens == "word" else 1


def _cache(recipe: Recipe, llm: Any, tokens: int, size: int) -> Line:
    config = llm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    beams = recipe.connector.num_beams
    # while beams are reordered, the old cache and the new one exist
    copies, what = beams * (2 if beams > 1 else 1), f"{beams} beams"
    if recipe.stage == "sequence_tuning" and recipe.sequence_tuning.samples > copies:
        copies, what = recipe.sequence_tuning.samples, f"{recipe.sequence_tuning.samples} samples"
    total = tokens * config.num_hidden_layers * 2 * heads * channels * size * copies
    rule = f"{tokens} tokens x {what} x {config.num_hidden_layers} layers x 2 x {heads * channels} numbers"
    fields = ("connector.num_beams", "connector.max_new_tokens", "train.micro_batch")
    return Line("cache of generation", total, rule, frozenset({GENERATION}), fields)


def _contrastive(recipe: Recipe, parts: Parts) -> Iterator[Line]:
    yield from _frames(recipe, parts, trains=True)
    yield from _text_encoder(parts)
    train, config = recipe.train, recipe.contrastive
    words = -(-recipe.data.max_frames // parts.visual.config.stride)
    sentence, tokens = config.objective != "token", config.objective != "sentence"
    framed, segmented = config.alignment.frame_weight > 0, config.alignment.segment_weight > 0
    rows = (1 if sentence else 0) * 2 + (words + _TEXT_TOKENS if tokens or segmented else 0)
    rows += (recipe.data.max_frames if framed else 0) + (_TEXT_TOKENS if config.alignment.used else 0)
    own = train.global_batch * rows * config.embed * 4
    rule = f"{train.global_batch} pairs, normalised in fp32, with their gradient; with more ranks, each its share"
    yield Line("features of the global batch", 2 * own, rule, _BACKWARD, ("train.global_batch",))
    mib = config.tile_mib or TILE_MIB["cuda"]
    longest = recipe.data.max_frames if framed else words if tokens or segmented else 0
    whole = 4 * train.global_batch**2 * max(longest * _TEXT_TOKENS, 1)
    rule = f"a tile of at most {mib} MiB: cosines, weights and gradients of both directions"
    yield Line("similarities", _TILE_COPIES * min(mib * 2**20, whole), rule, _BACKWARD, ("contrastive.tile_mib",))
    head = parts.modules["model"].gloss_head
    if isinstance(head, nn.Linear):
        logits = train.global_batch * words * head.out_features
        rule = f"{train.global_batch} clips x {words} word tokens x {head.out_features} classes, with their gradient"
        size = 2 if parts.dtype == torch.bfloat16 else 4
        yield Line("gloss logits", 2 * logits * size, rule, _BACKWARD, ("train.global_batch",))


def _text_encoder(parts: Parts) -> Iterator[Line]:
    if parts.text_encoder is None:
        return
    from transformers import AutoModel

    with torch.device("meta"):
        encoder = AutoModel.from_config(parts.text_encoder)
    numbers = sum(parameter.numel() for parameter in encoder.parameters())
    rule = "float32, until every text is encoded; then it goes"
    yield Line("text encoder", numbers * 4, rule, frozenset({START}), ("model.text_encoder.path",))


__all__ = ["activation_lines", "backbone_bytes", "clip_frames", "frames_per_pass", "llm_bytes"]
