"""The recipe: frozen pydantic models, a docstring under every field, checks beside them. No torch here.

Every component receives its own section, never the whole recipe. Numbers the paper (arXiv 2412.16524) does not
publish are recipe values; each default's source stands beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.augment_schema import AugmentConfig, ReferencesConfig
from pipeline.config.inputs_schema import FeaturesConfig, PoseConfig
from pipeline.config.prompt_schema import PromptsConfig
from pipeline.config.section import Section
from pipeline.config.sequence_schema import SequenceTuningConfig
from pipeline.config.stages import STAGES
from pipeline.config.supervision_schema import AlignmentConfig, CtcConfig
from pipeline.config.train_schema import TrainConfig
from pipeline.config.transfer_schema import InitFromConfig
from pipeline.config.weak_schema import JitterConfig

if TYPE_CHECKING:
    StageName = str
else:
    StageName = Literal[tuple(STAGES)]


AUTO = "auto"
"""Value of `deepspeed.base` that leaves the ZeRO stage to the memory planner."""


class TinyLlm(Section):
    """Sizes of a randomly initialised Llama-type causal LM, for demos and tests."""

    width: int = Field(default=128, gt=0)
    """Hidden size."""
    layers: int = Field(default=4, gt=0)
    """Decoder blocks."""
    heads: int = Field(default=4, gt=0)
    """Attention heads; they divide `width` into an even size each."""
    feed_forward: int = Field(default=384, gt=0)
    """Width inside the feed-forward blocks."""
    max_positions: int = Field(default=1024, gt=0)
    """Longest sequence in tokens."""


IMAGE_PIXELS, MAX_FRAMES, FRAME_STRIDE = 64, 256, 1
"""Defaults of the data section that models and exports share."""


class LlmConfig(Section):
    """The causal language model: a folder or hub id, or `tiny` sizes for random weights. Exactly one."""

    path: str | None = None
    """Hugging Face folder or hub id."""
    tiny: TinyLlm | None = None
    """Sizes of a new one with random weights."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id; defaults to `path`, required with `tiny`."""
    trust_remote_code: bool = False
    """Run the model code that the folder brings; only for folders you trust."""


class TinyVit(Section):
    """Sizes of a randomly initialised ViT frame backbone, for demos and tests."""

    width: int = Field(default=96, gt=0)
    """Hidden size."""
    layers: int = Field(default=2, gt=0)
    """Encoder blocks."""
    heads: int = Field(default=3, gt=0)
    """Attention heads; they divide `width`."""
    feed_forward: int = Field(default=192, gt=0)
    """Width inside the feed-forward blocks."""
    patch_pixels: int = Field(default=16, gt=0)
    """Side of a patch; it divides `data.image_pixels`."""


class BackboneConfig(Section):
    """Frame level: any Hugging Face vision model by `path`, or `tiny` sizes. Exactly one."""

    path: str | None = None
    """Hugging Face folder or hub id of a vision model."""
    tiny: TinyVit | None = None
    """Sizes of a new one with random weights."""
    kind: Literal["frame", "video"] = "frame"
    """`frame`: an image model, frame by frame. `video`: a video model (VideoMAE, TimeSformer, ViViT, V-JEPA 2) over
    windows of as many frames as it takes; needs `pool: mean`."""
    window_stride: int = Field(default=0, ge=0)
    """Frames between the beginnings of a video model's windows; 0 = side by side."""
    train: Literal["frozen", "lora", "full"] = "full"
    """Which backbone weights the contrastive stage changes."""
    lora_rank: int = Field(default=8, gt=0)
    """Rank of the adapters with `train: lora`."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """Their scale: outputs are multiplied by `lora_alpha / lora_rank`."""
    lora_targets: list[str] = []
    """Layers that get them, as in `train.parts`; empty = every linear layer."""
    pool: Literal["cls", "mean", "cls_mean"] = "cls"
    """How patch tokens become one frame token; `cls_mean` concatenates both."""
    frames_per_pass: int = Field(default=0, ge=0)
    """Frames per backbone forward (bounds memory); 0 = all at once."""


class WordLevelConfig(Section):
    """Word level: windowed attention inside short spans, then strided merging T -> ceil(T / stride)."""

    layers: int = Field(default=2, gt=0)
    """Transformer blocks at frame rate."""
    window_frames: int = Field(default=8, gt=0)
    """Attention span at frame rate; neighbouring layers shift it by half."""
    stride: int = Field(default=4, gt=0)
    """Frames merged into one word token (GFSLT reduces T to about T/4)."""
    heads: int = Field(default=4, gt=0)
    """Attention heads; they divide `model.visual.width` into an even size each."""


class SentenceLevelConfig(Section):
    """Sentence level: global attention over word tokens and attention pooling."""

    layers: int = Field(default=1, gt=0)
    """Transformer blocks over word tokens."""
    heads: int = Field(default=4, gt=0)
    """Attention heads of blocks and pooling, as at word level."""


class VisualConfig(Section):
    """The hierarchical visual encoder: an exported folder (`path`) or a new one from the parts below."""

    path: str | None = None
    """Folder exported by the contrastive stage; the remaining fields then come from it."""
    backbone: BackboneConfig | None = None
    """Frame level of a new encoder."""
    features: FeaturesConfig | None = None
    """In place of a backbone: features that another program computed."""
    pose: PoseConfig | None = None
    """Keypoints, alone or beside backbone or features."""
    width: int = Field(default=128, gt=0)
    """Width of word and sentence level."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability inside their blocks."""
    max_frames: int = Field(default=512, gt=0)
    """Longest clip in frames (positions)."""
    centre_clips: bool = True
    """Subtract each clip's mean frame feature: what signer, camera and background add to all of its frames. Clips in
    which nothing moves keep theirs; set false where short clips of one held sign are the data (docs/features.md)."""
    word: WordLevelConfig = WordLevelConfig()
    """Word level of a new encoder."""
    sentence: SentenceLevelConfig = SentenceLevelConfig()
    """Sentence level of a new encoder."""


class TextEncoderConfig(Section):
    """The large pretrained text encoder the video is aligned with; always frozen, its outputs are cached."""

    kind: Literal["hf", "llm"] = "hf"
    """`hf`: any Hugging Face encoder. `llm`: the stage-1 causal LM's own hidden states and token embeddings."""
    path: str
    """Hugging Face folder or hub id; with `llm` the export of stage 1."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """How token states become the sentence feature."""
    prefix: str = ""
    """Put before every text (multilingual-e5 wants `query: `)."""
    max_tokens: int = Field(default=128, gt=0)
    """Longer texts are cut to this many tokens, prefix included."""
    token_features: Literal["hidden", "embeddings"] = "hidden"
    """What the token-level objective sees: contextual states, or the input embeddings the LLM will read later."""


class ConnectorConfig(Section):
    """The 2-layer GELU MLP from word tokens to the LLM width."""

    hidden: int = Field(default=256, gt=0)
    """Width between its two layers."""
    tokens: Literal["word", "frame"] = "word"
    """Which level of the visual encoder the LLM reads; `frame` exists for the ablation."""


class ModelConfig(Section):
    llm: LlmConfig | None = None
    """The language model (continued_pretraining, connector)."""
    visual: VisualConfig | None = None
    """The visual encoder (contrastive, connector)."""
    text_encoder: TextEncoderConfig | None = None
    """The frozen text encoder (contrastive)."""
    connector: ConnectorConfig = ConnectorConfig()
    """Between the two (connector)."""
    init_from: InitFromConfig = InitFromConfig()
    """Exports of earlier runs whose weights this one starts with (docs/transfer.md)."""
    attention: Literal["auto", "fa4", "fa3", "fa2", "torch_varlen", "sdpa"] = "auto"
    """Attention kernel for packed documents and clips, in every stage: `auto` takes the best that runs and logs it; a
    kernel that is named but cannot run is an error. fa4, fa3 and fa2 are flash-attn's, `torch_varlen` is torch's own
    flash attention; `sdpa` runs on every device and in every precision."""
    kernels: Literal["auto", "liger", "torch"] = "auto"
    """Fused kernels of liger-kernel for the language model's layers and loss; `auto`: on CUDA where they fit."""
    gradient_checkpointing: bool | Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = False
    """Compute activations again in backward instead of keeping them: less memory, more time. A number: in this share
    of each part's layers; `auto`: the smallest of 0, 1/4, 1/2, 3/4 and 1 that fits into `deepspeed.gpu_memory_gib`."""


class SourceConfig(Section):
    """One shard set (or a part of it) and how often an epoch shows it."""

    shards: str
    """Folder, or URL in an object store (`s3://bucket/set`), with manifest.json and index.parquet."""
    split: str = "train"
    """Samples of this split."""
    corpus: str | None = None
    """Only samples of this corpus; default all."""
    pose: str | None = None
    """Shard set with the keypoints of the same samples, for an encoder that reads them beside frames
    (docs/inputs.md)."""
    text: str = ""
    """Text column that holds the texts to learn, such as pseudo-labels; samples without one are left out. Empty: the
    samples' own texts."""
    weight: float | list[tuple[int, float]] = 1.0
    """Passes over this source per epoch (2.0 shows every sample twice, 0.5 half of them, the other half next); with
    `data.epoch_samples` its proportion of an epoch. A list of [epoch, weight] points is a curriculum: linear between
    them, constant outside, 0 leaves the source out."""


class DataConfig(Section):
    train: list[SourceConfig] = Field(min_length=1)
    """What is trained on; at least one source."""
    eval: list[SourceConfig] = []
    """Held-out sources; empty = no held-out scores."""
    block_tokens: int = Field(default=1024, gt=1)
    """Length of one packed sequence (continued_pretraining)."""
    max_frames: int = Field(default=MAX_FRAMES, gt=0)
    """Longer clips are subsampled evenly to this many frames."""
    frame_stride: int = Field(default=FRAME_STRIDE, gt=0)
    """Keep every n-th stored frame."""
    image_pixels: int = Field(default=IMAGE_PIXELS, gt=0)
    """Side of the square image the backbone sees; stored frames are resized (short side) and centre-cropped."""
    frame_budget: int | None = Field(default=None, gt=0)
    """Group clips of similar length so that frames per item stay below this; None = one clip per item."""
    pack_tokens: int = Field(default=0, ge=0)
    """Pack clips with their prompts and texts into items of at most this many tokens of the language model (connector),
    so that all items cost about the same; no sample is cut. 0 = one clip per item, or `frame_budget`."""
    length_window: int = Field(default=0, ge=0)
    """Sort by length inside windows of this many items (0 = off); order stays a pure function of the seed."""
    unique_texts: bool = False
    """No text occurs twice in a global batch (contrastive)."""
    epoch_samples: int = Field(default=0, ge=0)
    """Samples per epoch over all sources, their weights being proportions; 0 = weights count passes."""
    augment: AugmentConfig = AugmentConfig()
    """What training changes in clips."""
    references: ReferencesConfig = ReferencesConfig()
    """Further texts of the samples."""
    jitter: JitterConfig = JitterConfig()
    """How far training moves the cuts of weakly aligned clips."""
    access: Literal["auto", "ranged", "cache"] = "auto"
    """How shards in object stores are read: only the bytes wanted (`ranged`), or whole ones through the `cache` of the
    host; `auto`: cache when cache_gib is set."""
    cache_dir: str | None = None
    """Node-local folder for what is fetched from object stores (needed there), and for copies of large indices."""
    cache_gib: float = Field(default=0.0, ge=0)
    """Most that cached shards may take on a host, over all sets."""
    storage_options: dict[str, object] = {}
    """For the object store's fsspec file system (`endpoint_url`, `profile`); credentials belong in its own files."""
    workers: int = Field(default=1, ge=0)
    """Loader processes per rank, for training and for held-out data."""
    max_bad_samples: int = Field(default=100, ge=0)
    """Damaged samples replaced and counted before the run stops."""


class ContinuedPretrainingConfig(Section):
    loss_chunk_tokens: int = Field(default=1024, gt=0)
    """Positions whose logits exist at once."""
    mlp_chunk_tokens: int = Field(default=0, ge=0)
    """Positions whose MLP activations exist at once, computed again in backward; 0 = all, nothing is repeated."""
    offload_activations: bool = False
    """With `model.gradient_checkpointing`: what each layer keeps for backward waits in host memory."""


TILE_MIB = {"cpu": 4, "cuda": 64}
"""Automatic `contrastive.tile_mib` by kind of device: what stays in a processor's cache, and what keeps a GPU busy."""


class ContrastiveConfig(Section):
    objective: Literal["sentence", "token", "both"] = "both"
    """What is trained, and scored on held-out data: sentence embeddings, token similarity, or both."""
    embed: int = Field(default=128, gt=0)
    """Width E of the shared space."""
    token_weight: float = Field(default=1.0, gt=0)
    """Weight of the token-level objective (CiCo-style) beside the sentence-level one in `both`."""
    initial_temperature: float = Field(default=0.07, gt=0)
    """CLIP, arXiv 2103.00020."""
    max_logit_scale: float = Field(default=100.0, gt=1)
    """The learned 1/temperature is clamped to this (CLIP)."""
    sentence_loss: Literal["softmax", "sigmoid"] = "softmax"
    """How sentence embeddings are told apart: each among all of the global batch (CLIP), or pair by pair with a learned
    bias (SigLIP, arXiv 2303.15343, which starts from `initial_temperature: 0.1`)."""
    tile_mib: int = Field(default=0, ge=0)
    """Similarities in memory at once, rows and columns together; 0 = 4 on a CPU, 64 on a GPU."""
    glosses: str = Field(default="gloss", pattern="^[a-z][a-z0-9_]*$")
    """Where a clip's glosses are, for `ctc` and `alignment`: words between spaces, in the index (`gloss`) or in a text
    column of this name, such as pseudo-glosses (docs/data-format.md)."""
    ctc: CtcConfig = CtcConfig()
    """Glosses told to the word tokens, beside the objective (docs/gloss-supervision.md)."""
    alignment: AlignmentConfig = AlignmentConfig()
    """Glosses aligned with frames and word tokens, beside the objective (docs/gloss-supervision.md)."""

    @model_validator(mode="before")
    @classmethod
    def _without_row_chunk(cls, data: Any) -> Any:
        """Recipes of earlier versions hold it; `tile_mib` bounds rows and columns, and needs no choice."""
        return {key: value for key, value in data.items() if key != "row_chunk"} if isinstance(data, dict) else data


class ConnectorStageConfig(Section):
    prompt: str = "{video}"
    """Text around the word tokens; must contain `{video}` once. Control tokens in it are those tokens. It may show
    `{language}`, `{sign_language}`, `{previous}`, `{gloss}` and `{example}` of each sample (docs/prompts.md)."""
    prompts: PromptsConfig = PromptsConfig()
    """Where these fields get their texts from."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Longest translation during training's evaluations."""
    num_beams: int = Field(default=1, gt=0)
    """Beams of those translations; 1 = greedy."""
    score_protocol: str = "default"
    """Scoring protocol of the dev BLEU (see pipeline/evaluate/protocols)."""
    eval_samples: int = Field(default=0, ge=0)
    """Held-out samples translated per evaluation during training; 0 = all. `train.eval_batches` limits it further."""


class DeepSpeedConfig(Section):
    base: str = "zero3"
    """Name in ds_configs/ or a path to a JSON file. `auto`: the first of zero1, zero2, zero3, zero3_offload that fits
    into `gpu_memory_gib`; frozen models are then replicated where they fit and sharded where not."""
    overrides: dict[str, object] = {}
    """Merged into the base; known DeepSpeed keys only."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU, which the plan has to fit into; `slt launch plan --gpu-memory` sets it too."""
    bucket_width: int | None = Field(default=None, gt=0)
    """Model width that ZeRO bucket sizes written as "auto" follow; None = the hidden size of the widest model."""


class Recipe(Section):
    """One stage of training, fully described."""

    name: str
    """Shown in logs."""
    stage: StageName
    """Which of the stages this is."""
    seed: int = 0
    """Of data order, new weights and dropout."""
    run_dir: str
    """Where the run writes; relative paths start at the working directory."""
    model: ModelConfig
    """The parts."""
    data: DataConfig
    """What is read, and how."""
    train: TrainConfig
    """Length, batch, optimizer, checkpoints."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """The engine."""
    continued_pretraining: ContinuedPretrainingConfig = ContinuedPretrainingConfig()
    """Of this stage only."""
    contrastive: ContrastiveConfig = ContrastiveConfig()
    """Of this stage only."""
    connector: ConnectorStageConfig = ConnectorStageConfig()
    """Of this stage, and of sequence_tuning, which goes on with it."""
    sequence_tuning: SequenceTuningConfig = SequenceTuningConfig()
    """Of this stage only."""
