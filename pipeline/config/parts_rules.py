"""Rules between `train.parts` and the rest of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.parts_schema import BACKBONE, PartConfig, part_of, short_form
from pipeline.config.schema import Recipe
from pipeline.config.source import Problem
from pipeline.config.stages import STAGES

_RATES, _ADAPTERS = ("lr", "lr_decay", "start_step"), ("lora_rank", "lora_alpha", "lora_targets")


def parts_problems(recipe: Recipe) -> Iterator[Problem]:
    """Settings of a part that its mode does not read, new weights that would be lost, a late start, a short form that
    says something else."""
    for path, part in recipe.train.parts.items():
        yield from _unread(path, part)
        yield from _lost(recipe, path, part)
        steps = recipe.train.steps
        if steps is not None and part.start_step >= steps:
            text = f"train.parts.{path}.start_step={part.start_step} is not before the end (train.steps={steps})"
            yield Problem(text, (f"train.parts.{path}.start_step", "train.steps"))
    visual, part_of_backbone = recipe.model.visual, recipe.train.parts.get(BACKBONE)
    if visual is None or visual.backbone is None or part_of_backbone is None:
        return
    for name, value in short_form(part_of_backbone).items():
        if (written := getattr(visual.backbone, name)) != value:
            setting = f"model.visual.backbone.{name}"
            text = f"{setting}={written} contradicts train.parts.{BACKBONE}, which makes it {value}; leave it out"
            yield Problem(text, (setting, "train.parts"))


def unreached(recipe: Recipe) -> tuple[str, ...]:
    """Paths whose outputs the loss of the stage does not read, so that they get no gradient."""
    if not STAGES[recipe.stage].translates:
        return ()
    return ("visual.sentence",) if recipe.model.connector.tokens == "word" else ("visual.sentence", "visual.word")


def _unread(path: str, part: PartConfig) -> Iterator[Problem]:
    frozen, adapted = part.mode == "frozen", part.mode == "lora"
    for name in (*(_RATES if frozen else ()), *(() if adapted else _ADAPTERS)):
        default = PartConfig.model_fields[name].get_default()
        if getattr(part, name) != default:
            setting = f"train.parts.{path}.{name}"
            text = f"{setting} is set, but the part's mode is {part.mode}; leave it out, or change the mode"
            yield Problem(text, (setting,))


def _lost(recipe: Recipe, path: str, part: PartConfig) -> Iterator[Problem]:
    """Frozen weights are in no checkpoint, because they are where they came from; new ones come from nowhere. What the
    exports of `model.init_from` hold is seen when they are opened."""
    llm, visual = recipe.model.llm, recipe.model.visual
    backbone = None if visual is None else visual.backbone
    initial = recipe.model.init_from
    new_llm = llm is not None and llm.tiny is not None and not (initial.llm or initial.model)
    new_backbone = backbone is not None and backbone.tiny is not None and not (initial.visual or initial.model)
    tiny = {"llm": new_llm, BACKBONE: new_backbone}
    new = next((name for name, is_new in tiny.items() if is_new and part_of(path, [name])), "")
    if new and part.mode != "trained":
        text = (
            f"train.parts.{path}.mode={part.mode} freezes the new (tiny) weights of model.{new}, which no checkpoint"
            " would hold; give it a path, or use mode: trained"
        )
        yield Problem(text, (f"train.parts.{path}.mode", f"model.{new}"))


__all__ = ["parts_problems", "unreached"]
