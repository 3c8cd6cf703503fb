"""The hierarchical visual encoder: frames -> frame level -> word level -> sentence level.

Its frame level is a backbone over images, features that another program stored, keypoints, or frames and keypoints
together: then the sum of both, each projected to the width.

The paper (LLaVA-SLT, arXiv 2412.16524) names the hierarchy and its purpose, a word-level representation that suits an
LLM's token embeddings, but publishes no sizes; every size here is a config value.

Legend: B samples, N packed frames, M packed word tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from pipeline.config.inputs_schema import PoseConfig
from pipeline.config.schema import IMAGE_PIXELS, BackboneConfig, VisualConfig
from pipeline.errors import RecipeError
from pipeline.models import frame_level
from pipeline.models.attention import Reach, choose, ragged_attention
from pipeline.models.clip_layout import ClipLayout, ClipSizes
from pipeline.models.clip_level import ClipBackbone, window_frames
from pipeline.models.lora import add_described
from pipeline.models.pose_level import CHANNELS, PoseLevel
from pipeline.models.streams import Inputs, Streams, frames_of
from pipeline.models.visual_inputs import Expected, check_inputs
from pipeline.models.word_level import TemporalBlock, WordLevel, WordLevelSizes, rotary

IMAGE_MEAN, IMAGE_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""Normalisation of a backbone without preprocessor_config.json: [0, 255] -> [-1, 1]."""
_RECIPE, _BACKBONE = VisualConfig(), BackboneConfig()


class VisualEncoderConfig(PreTrainedConfig):
    """Everything needed to rebuild the encoder without the recipe. Its defaults are the recipe's.

    Args:
        backbone_config: nested config of any Hugging Face vision model.
        pool: cls | mean | cls_mean, how a frame's tokens become one.
        width: D of the word and sentence levels.
        stride: frames merged into one word token.
        max_frames: longest clip accepted; positions are relative, so this is a guard and not a table.
        image_pixels, image_mean, image_std: what the backbone expects.
        backbone_train: frozen | lora | full; which backbone weights `freeze_backbone` leaves trainable.
        lora_rank, lora_alpha, lora_targets: the backbone's adapters present in the weights (rank 0 = none).
        adapters: all other adapters present in the weights, as `pipeline.models.lora.described`.
        frames_per_pass: frames per backbone forward, 0 = all.
        centre_clips: subtract every clip's mean frame feature: what signer, clothes and background add to
            all of its frames (as cepstral mean normalisation does for a speaker's channel). Still clips keep theirs.
        backbone_fingerprint: identity of a pretrained backbone's weights and preprocessing, from `build_visual`;
            empty if training made or changed them. Says which stored frame features belong to it.
        clip_stride: frames between the windows of a video model; 0 for an image model.
        features_width: numbers per row of the stored features that it reads in place of a backbone's; 0 = none.
        pose_layout, pose_groups, pose_width, pose_fingerprint: keypoints that it reads, alone or beside frames: their
            layout, the joints of every group, the width of a group, and which stored keypoints fit. Empty = none.
    """

    model_type = "slt_visual"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  (the base class declares it mutable)

    backbone_config: Any = None
    pool: str = _BACKBONE.pool
    width: int = _RECIPE.width
    dropout: float = _RECIPE.dropout
    max_frames: int = _RECIPE.max_frames
    image_pixels: int = IMAGE_PIXELS
    image_mean: Sequence[float] = IMAGE_MEAN
    image_std: Sequence[float] = IMAGE_STD
    word_layers: int = _RECIPE.word.layers
    word_heads: int = _RECIPE.word.heads
    window_frames: int = _RECIPE.word.window_frames
    stride: int = _RECIPE.word.stride
    sentence_layers: int = _RECIPE.sentence.layers
    sentence_heads: int = _RECIPE.sentence.heads
    backbone_train: str = _BACKBONE.train
    lora_rank: int = 0
    lora_alpha: float = _BACKBONE.lora_alpha
    lora_targets: Sequence[str] = ()
    adapters: Any = ()
    frames_per_pass: int = _BACKBONE.frames_per_pass
    centre_clips: bool = _RECIPE.centre_clips
    backbone_fingerprint: str = ""
    clip_stride: int = 0
    features_width: int = 0
    pose_layout: str = ""
    pose_groups: Sequence[int] = ()
    pose_width: int = PoseConfig.model_fields["width"].default
    pose_fingerprint: str = ""
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        elif self.backbone_config is None and not (self.features_width or self.pose_layout):
            self.backbone_config = AutoConfig.for_model("vit")
        # a copy, because the base class resets the attention choice of every nested config it is given
        self.backbone_config = copy.deepcopy(self.backbone_config)
        self._check()
        super().__post_init__(**kwargs)

    @property
    def reads_frames(self) -> bool:
        """Whether it reads images or their features; an encoder of keypoints alone does not."""
        return self.backbone_config is not None or self.features_width > 0

    @property
    def rows_fingerprint(self) -> str:
        """Identity of the stored rows that it takes in place of images; empty if there are none."""
        return self.backbone_fingerprint if self.reads_frames else self.pose_fingerprint

    @property
    def pose_channels(self) -> int:
        """Numbers of a frame's keypoints; 0 if it reads none."""
        return CHANNELS * sum(self.pose_groups)

    def word_count(self, frames: int) -> int:
        """Word tokens of a clip of ``frames`` frames: ceil(frames / stride)."""
        return -(-frames // self.stride)

    def clip_sizes(self) -> ClipSizes:
        """What `ClipLayout.of` needs to know of this encoder."""
        sizes = ClipSizes(self.window_frames, self.stride, self.max_frames)
        if not self.clip_stride:
            return sizes
        return sizes._replace(clip_frames=window_frames(self.backbone_config), clip_stride=self.clip_stride)

    def _check(self) -> None:
        for name, heads in (("word.heads", self.word_heads), ("sentence.heads", self.sentence_heads)):
            if self.width % heads or (self.width // heads) % 2:
                raise RecipeError(
                    f"model.visual.{name}: {heads} heads do not divide width {self.width} into an even number of"
                    " channels (rotary positions pair them); change model.visual.width or the heads."
                )
        if self.pool not in frame_level.POOLS:
            known = ", ".join(frame_level.POOLS)
            raise RecipeError(f"model.visual.backbone.pool: {self.pool!r} is not one of {known}.")


@dataclass
class VisualOutput(ModelOutput):
    """Packed outputs: the rows of all samples one after another, as ``layout`` says."""

    frames_ND: Tensor = None  # type: ignore[assignment]  # ModelOutput wants defaults
    words_MD: Tensor = None  # type: ignore[assignment]
    sentence_BD: Tensor = None  # type: ignore[assignment]  # None where it was not asked for
    layout: ClipLayout = None  # type: ignore[assignment]
    pooled_NP: Tensor = None  # type: ignore[assignment]
    """`HierarchicalVisualEncoder.pooled` of the frames."""


STILL_CLIP = 1e-4
"""A clip is still if its frames' squared distances from their mean are less than this part of their squares: one
hundredth of their size. Centring it would leave only noise."""


def _centred(frames_ND: Tensor, layout: ClipLayout) -> Tensor:
    """Frame features minus the mean over their own clip; still clips (and single frames) are unchanged."""
    wide_ND = frames_ND if frames_ND.dtype == torch.float64 else frames_ND.float()  # sums over hundreds of frames
    mean_BD = _sum_clips(wide_ND, layout) / layout.frame_lengths_B[:, None]
    with torch.no_grad():
        moved_ND = wide_ND - mean_BD.index_select(0, layout.frame_samples_N)
        moved_B, whole_B = (_sum_clips(rows_ND.square().sum(1), layout) for rows_ND in (moved_ND, wide_ND))
        moves_B = moved_B > STILL_CLIP * whole_B
    mean_BD = mean_BD * moves_B[:, None]
    return frames_ND - mean_BD.index_select(0, layout.frame_samples_N).to(frames_ND.dtype)


def _sum_clips(rows_NX: Tensor, layout: ClipLayout) -> Tensor:
    sums_BX = rows_NX.new_zeros(len(layout.frame_lengths_B), *rows_NX.shape[1:])
    return sums_BX.index_add(0, layout.frame_samples_N, rows_NX)


class AttentionPooling(nn.Module):
    """One learned query attends over a sample's word tokens (Set Transformer, arXiv 1810.00825, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = "sdpa"
        """Backend of `ragged_attention`."""
        self.query = nn.Parameter(torch.empty(width))
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, rows_MD: Tensor, layout: ClipLayout) -> Tensor:
        k, v = self.key_value(rows_MD).unflatten(-1, (2, self.heads, -1)).unbind(1)
        # rows of their own: no kernel is asked to read one row as many
        q = self.query.view(1, self.heads, -1).repeat(len(layout.word_lengths_B), 1, 1)
        mixed = ragged_attention(q, k, v, Reach(layout.queries, layout.samples), self.attention)
        return self.out(mixed.flatten(1))


class HierarchicalVisualEncoder(PreTrainedModel):
    """Frames of a batch of clips -> frame, word and sentence representations. See `forward`.

    Build it with `pipeline.models.registry.build_visual`, or `AutoModel.from_config` / `from_pretrained`, which also
    work while a ZeRO-3 `HfDeepSpeedConfig` is alive (the plain constructor does not).
    """

    config: VisualEncoderConfig
    config_class = VisualEncoderConfig
    base_model_prefix = "visual"
    main_input_name = "frames_NHWC"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TemporalBlock"]  # noqa: RUF012

    def __init__(self, config: VisualEncoderConfig, backbone: PreTrainedModel | None = None) -> None:
        """``backbone``: a loaded vision model to use instead of a new one from ``config.backbone_config``."""
        super().__init__(config)
        width = config.width
        self.backbone: Any = frame_level.NoBackbone() if config.backbone_config is None else self._frames(backbone)
        if config.reads_frames:
            self.frame_projection = nn.Linear(self.stored_width(), width)
        if config.pose_layout:
            self.pose_level = PoseLevel(config.pose_groups, config.pose_width)
            self.pose_projection = nn.Linear(len(config.pose_groups) * config.pose_width, width)
        self.frame_norm = nn.LayerNorm(width)
        self.word_level = WordLevel(
            WordLevelSizes(width, config.word_layers, config.stride, config.word_heads, config.dropout)
        )
        self.word_norm = nn.LayerNorm(width)
        self.sentence_blocks = nn.ModuleList(
            TemporalBlock(width, config.sentence_heads, config.dropout) for _ in range(config.sentence_layers)
        )
        self.sentence_norm = nn.LayerNorm(width)
        self.sentence_pool = AttentionPooling(width, config.sentence_heads)
        add_described(self, config.adapters)
        self.post_init()

    def _frames(self, backbone: PreTrainedModel | None) -> frame_level.FrameBackbone | ClipBackbone:
        config = self.config
        model = frame_level.new_backbone(config.backbone_config) if backbone is None else backbone
        config.backbone_config = model.config
        if config.lora_rank:
            frame_level.add_adapters(model, config.lora_rank, config.lora_alpha, config.lora_targets)
        kind = ClipBackbone if config.clip_stride else frame_level.FrameBackbone
        return kind(model, config.pool, config.image_pixels)

    def stored_width(self) -> int:
        """Numbers of a row that may stand for a frame: pooled backbone features, stored features, or keypoints."""
        config = self.config
        if config.backbone_config is not None:
            return frame_level.pooled_width(config.backbone_config, config.pool)
        return config.features_width or config.pose_channels

    def _expected(self) -> Expected:
        config = self.config
        pixels = 0 if config.backbone_config is None else config.image_pixels
        beside = config.pose_channels if config.reads_frames else 0
        return Expected(config.clip_sizes(), self.stored_width(), pixels, beside)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AttentionPooling):
            init.normal_(module.query, std=self.config.initializer_range)

    def add_lora(self, rank: int, alpha: float, targets: Sequence[str] = ()) -> None:
        """Adds backbone adapters to a built encoder and records them in the config, so that exports carry them."""
        frame_level.add_adapters(self.backbone.model, rank, alpha, targets)
        self.config.lora_rank, self.config.lora_alpha, self.config.lora_targets = rank, alpha, list(targets)

    def freeze_backbone(self) -> None:
        """Sets requires_grad of the backbone as ``config.backbone_train`` says; a stage may plan otherwise."""
        mode = self.config.backbone_train
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(mode == "full" or (mode == "lora" and "lora_" in name))

    def choose_attention(self, name: str, device: torch.device | str) -> None:
        """Attends from now on with the backend that `attention.choose` finds for this device and the encoder's
        precision, at word and at sentence level. A new or loaded encoder uses `sdpa`, which runs everywhere.

        Raises:
            RecipeError: a forced backend cannot run there, or not with this many channels per head.
        """
        config = self.config
        word, sentence = config.width // config.word_heads, config.width // config.sentence_heads
        parts = {word: "the encoder's word level", sentence: "the encoder's sentence level"}
        if word == sentence:
            parts = {word: "the encoder"}
        backend_of = {channels: choose(name, device, self.dtype, channels, part) for channels, part in parts.items()}
        for block in (*self.word_level.frame_blocks, *self.word_level.word_blocks):
            block.attention = backend_of[word]
        for block in (*self.sentence_blocks, self.sentence_pool):
            block.attention = backend_of[sentence]

    def pooled(self, frames_NHWC: Tensor, layout: ClipLayout | None = None) -> Tensor:
        """uint8 frames -> pooled backbone features [N, pooled width], as feature shards store them.

        Frames are normalised pass by pass: as uint8 they take a quarter of the memory. ``layout``: of these clips,
        for a video model.
        """
        config = self.config
        if isinstance(self.backbone, ClipBackbone):
            assert layout is not None  # a video model reads clips
            at_once = config.frames_per_pass and max(1, config.frames_per_pass // self.backbone.frames)
            return self.backbone.over_clips(
                frames_NHWC,
                layout,
                at_once,
                lambda part: frame_level.normalise(part, config.image_mean, config.image_std, self.dtype),
            )
        passes = frames_NHWC.split(config.frames_per_pass) if config.frames_per_pass else (frames_NHWC,)
        mean, std = config.image_mean, config.image_std
        return torch.cat([self.backbone(frame_level.normalise(part, mean, std, self.dtype)) for part in passes])

    def forward(
        self,
        frames_NHWC: Inputs,
        frame_lengths_B: Tensor | None = None,
        layout: ClipLayout | None = None,
        sentences: bool = True,
    ) -> VisualOutput:
        """Encodes clips.

        Args:
            frames_NHWC: uint8 frames of all samples, one sample after another; or, as floats [N, pooled width], their
                stored `pooled` features, which skip the (frozen) backbone. An encoder of keypoints alone takes these
                as floats; one that reads both takes `Streams`.
            frame_lengths_B: frames of each sample, at least 1 each; they sum to N. Read only without a layout.
            layout: of these lengths, on the device of the frames. Without one it is made here, for which the host waits
                for a CUDA device.
            sentences: whether to compute the sentence level; without it ``sentence_BD`` is None.
        Raises:
            DataError: lengths that do not fit the frames, an empty clip, or a clip longer than ``max_frames``.
        """
        frames = frames_of(frames_NHWC)
        layout = self._layout(frames, frame_lengths_B) if layout is None else layout
        check_inputs(frames_NHWC, layout, self._expected())
        config = self.config
        pooled_NP, frames_ND = self._project(frames_NHWC, layout)
        frames_ND = self.frame_norm(_centred(frames_ND, layout) if config.centre_clips else frames_ND)
        rows_MD = self.word_level(frames_ND, layout)
        words_MD = self.word_norm(rows_MD)
        sentence_BD: Any = self._sentences(rows_MD, layout) if sentences else None
        return VisualOutput(frames_ND, words_MD, sentence_BD, layout, pooled_NP)

    def _project(self, inputs: Inputs, layout: ClipLayout) -> tuple[Tensor, Tensor]:
        """Pooled features (or keypoints) and their projection [N, D]; of two streams the sum of both projections."""
        frames = frames_of(inputs)
        if not self.config.reads_frames:
            return frames, self.pose_projection(self.pose_level(frames))
        pooled_NP = frames.to(self.dtype) if frames.is_floating_point() else self.pooled(frames, layout)
        frames_ND = self.frame_projection(pooled_NP)
        if isinstance(inputs, Streams):
            frames_ND = frames_ND + self.pose_projection(self.pose_level(inputs.pose_NK))
        return pooled_NP, frames_ND

    def _sentences(self, rows_MD: Tensor, layout: ClipLayout) -> Tensor:
        config = self.config
        rope = rotary(layout.word_positions_M, config.width // config.sentence_heads)
        for block in self.sentence_blocks:
            rows_MD = block(rows_MD, layout.samples, rope)
        pooled: Tensor = self.sentence_pool(self.sentence_norm(rows_MD), layout)
        return pooled

    def _layout(self, frames_NHWC: Tensor, frame_lengths_B: Tensor | None) -> ClipLayout:
        lengths = [] if frame_lengths_B is None else frame_lengths_B.tolist()
        return ClipLayout.of(lengths, self.config.clip_sizes()).to(frames_NHWC.device)
