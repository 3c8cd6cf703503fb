"""Rules about what a visual encoder reads: images or stored features, keypoints, or both."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.schema import Recipe
from pipeline.config.source import Problem


def visual_input_problems(recipe: Recipe) -> Iterator[Problem]:
    """What a visual encoder reads: an export's, or images or features, keypoints, or keypoints beside one of them."""
    visual = recipe.model.visual
    if visual is None:
        yield from _poses_beside(recipe, fused=False)
        return
    parts = [name for name in ("backbone", "features", "pose") if getattr(visual, name) is not None]
    fields = ("model.visual.path", *(f"model.visual.{name}" for name in parts))
    if visual.path is not None and parts:
        listed = " and ".join(parts)
        text = f"model.visual takes exactly one of path and {listed}, got both; an export brings what it reads"
        yield Problem(f"{text}; set one of them to null", fields)
    elif visual.path is None and not parts:
        text = "model.visual needs exactly one of path and backbone, got neither; features or pose may replace backbone"
        yield Problem(text, ("model.visual.path", "model.visual.backbone"))
    elif visual.backbone is not None and visual.features is not None:
        text = "model.visual takes exactly one of backbone and features: stored features stand where a backbone would"
        yield Problem(f"{text}; set one of them to null", fields[1:])
    if visual.backbone is not None and visual.backbone.kind == "video":
        if visual.backbone.tiny is not None:
            text = "model.visual.backbone.kind=video needs a path: tiny makes an image model"
            yield Problem(text, ("model.visual.backbone.kind", "model.visual.backbone.tiny"))
        elif visual.backbone.pool != "mean":
            text = f"model.visual.backbone.pool={visual.backbone.pool}, but kind=video has only a mean; set pool: mean"
            yield Problem(text, ("model.visual.backbone.pool", "model.visual.backbone.kind"))
    if visual.path is None:
        yield from _poses_beside(recipe, fused="pose" in parts and len(parts) > 1)
    yield from _unseen_by_keypoints(recipe)


def _poses_beside(recipe: Recipe, fused: bool) -> Iterator[Problem]:
    """Sources name keypoints beside their samples exactly where a new encoder reads both."""
    for place, sources in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        for number, source in enumerate(sources):
            name = f"{place}.{number}.pose"
            if fused and source.pose is None:
                text = f"{name} is missing: the encoder reads keypoints beside frames; name their shard set"
                yield Problem(text, (name, "model.visual.pose"))
            elif source.pose is not None and not fused:
                text = f"{name}={source.pose} is for encoders with model.visual.pose beside a backbone or features"
                yield Problem(f"{text}; name keypoints alone as shards", (name, "model.visual.pose"))


def _unseen_by_keypoints(recipe: Recipe) -> Iterator[Problem]:
    """Changes of frames that keypoints beside them would not follow."""
    data = recipe.data
    if not any(source.pose is not None for source in data.train):
        return
    if data.augment.flip:
        text = f"data.augment.flip={data.augment.flip} mirrors frames, but not the keypoints beside them; set 0"
        yield Problem(text, ("data.augment.flip",))
    if data.jitter.most_seconds:
        text = "data.jitter moves cuts into margins, which the keypoints of data.train.N.pose do not have; leave it out"
        yield Problem(text, ("data.jitter",))


__all__ = ["visual_input_problems"]
