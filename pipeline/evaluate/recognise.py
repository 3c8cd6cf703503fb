"""Read the glosses of a split with an exported encoder and its gloss head, and count the errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.resolve import ResolvedRecipe
from pipeline.config.schema import DataConfig
from pipeline.errors import CheckpointError
from pipeline.evaluate.word_errors import WordErrors, word_errors
from pipeline.inference.clips import Clip, Clips, FetchFrames, check_poses, check_rows, pack_clips
from pipeline.models.clip_layout import ClipSizes
from pipeline.models.gloss_vocabulary import GlossVocabulary
from pipeline.models.visual import HierarchicalVisualEncoder
from shards.atomic import write_atomic
from shards.format.index import open_index
from shards.load.loader import EvalLoader
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.schema import IndexRow


@dataclass(frozen=True, slots=True)
class Recognised:
    """One clip."""

    corpus: str
    sample_id: str
    hypothesis: str
    reference: str


@dataclass(frozen=True, slots=True)
class RecogniseOptions:
    """What to read."""

    split: str = "dev"
    micro_batch: int = 8
    max_samples: int = 0
    """Only the first clips of the split; 0 = all."""
    device: str = "cpu"


class GlossReader:
    """An exported encoder with its gloss head: clips in, glosses out.

    Args:
        export_dir: folder that `slt export` wrote for a contrastive run with a gloss head.
        device: where it runs.

    Raises:
        CheckpointError: no such folder.
        DataError: an export without glosses.
    """

    def __init__(self, export_dir: Path, device: str = "cpu") -> None:
        if not (export_dir / "heads.safetensors").is_file():
            raise CheckpointError(
                f"{export_dir} holds no heads.safetensors; give what `slt export` wrote for a contrastive run"
            )
        self.vocabulary = GlossVocabulary.load(export_dir)
        encoder = HierarchicalVisualEncoder.from_pretrained(export_dir)
        self.encoder: Any = encoder.to(device).eval()  # type: ignore[arg-type]  # as in extract_features
        self.encoder.choose_attention("auto", device)
        heads = load_file(export_dir / "heads.safetensors")
        self.weight_VD, self.bias_V = (heads[f"gloss_head.{name}"].to(device) for name in ("weight", "bias"))
        text = (export_dir / "recipe.resolved.yaml").read_text(encoding="utf-8")
        self.data: DataConfig = ResolvedRecipe.from_yaml(text).recipe.data  # how clips were read in training

    @torch.inference_mode()
    def logits(self, clips: Clips) -> Tensor:
        """Of the word tokens of a micro-batch, packed [M, V]."""
        layout = clips["layout"].to(self.encoder.device)
        output = self.encoder(clips["frames_NHWC"].to(self.encoder.device), layout=layout, sentences=False)
        return F.linear(output.words_MD, self.weight_VD, self.bias_V)

    def read(self, clips: Clips) -> list[list[str]]:
        """The glosses of every clip."""
        return self.vocabulary.decode(self.logits(clips).cpu(), clips["layout"].word_lengths_B.tolist())


@dataclass(frozen=True, slots=True)
class _Collate:
    sizes: ClipSizes

    def __call__(self, items: list[list[Clip]]) -> Clips:
        return pack_clips(items, self.sizes)


def recognise_export(
    export_dir: Path,
    shards: Sequence[Path],
    options: RecogniseOptions,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[WordErrors, list[Recognised]]:
    """Read every clip of a split and count the errors in those that have glosses in the index.

    Returns:
        The errors, and what was read in every clip, in the order of the split.

    Raises:
        CheckpointError: the export cannot be used.
        DataError: shards that cannot be read, or a split without glosses.
        RecipeError: stored features of another backbone.
    """
    reader = GlossReader(export_dir, options.device)
    data = reader.data
    sources = [Source(open_index(path), options.split) for path in shards]
    plan = Plan(sources, PlanOptions("clip", shuffle=False, max_frames=data.max_frames, frame_stride=data.frame_stride))
    check_rows(plan, reader.encoder.config)
    check_poses(None, reader.encoder.config, "this command takes none")
    loader = EvalLoader(
        plan, FetchFrames(data.max_frames, data.frame_stride, data.image_pixels),
        _Collate(reader.encoder.config.clip_sizes()), micro_batch=options.micro_batch, max_samples=options.max_samples,
    )  # fmt: skip
    found: list[Recognised] = []
    for clips, samples in cast(Iterator[tuple[Clips, list[int]]], loader.padded()):
        read = zip(clips["rows"], reader.read(clips), strict=True)
        found += [_row(row, glosses) for row, glosses in read][: len(samples)]
        if on_progress is not None:
            on_progress(len(found), loader.n_items)
    known = [row for row in found if row.reference]
    return word_errors([row.hypothesis.split() for row in known], [row.reference.split() for row in known]), found


def write_recognised(path: Path, found: Sequence[Recognised]) -> None:
    """A table with a line per clip, tabs between columns."""
    names = [field.name for field in dataclasses.fields(Recognised)]
    lines = ["\t".join(names), *("\t".join(getattr(row, name) for name in names) for row in found)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(lines) + "\n")


def _row(row: IndexRow, glosses: list[str]) -> Recognised:
    return Recognised(row.corpus, row.sample_id, " ".join(glosses), " ".join(row.gloss.split()))
