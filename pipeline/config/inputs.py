"""A recipe's inputs must exist and fit each other before any process starts: shard sets, exports, tokenizers.

Reads manifests, file names, configs and single columns of an index; loads no model and asks no other machine. Inputs
in an object store or on the hub are left to the run, unless the hub cannot be reached at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.config.checks import is_remote
from pipeline.config.fit import fit_problems
from pipeline.config.load import LoadedRecipe, problem_message
from pipeline.config.pretrained import part_problem, parts_of
from pipeline.config.schema import Recipe, SourceConfig
from pipeline.config.shard_sets import SetFacts, column_of, open_source
from pipeline.config.source import Problem, shown_path
from pipeline.config.stages import STAGES
from pipeline.errors import RecipeError


def check_inputs(loaded: LoadedRecipe) -> None:
    """Refuse a recipe whose inputs on this machine are missing, of the wrong kind, or do not fit each other.

    Raises:
        RecipeError: lists every problem with the line of its setting.
    """
    problems = list(input_problems(loaded.recipe))
    if problems:
        raise RecipeError(problem_message(shown_path(loaded.path), problems, loaded.origins))


def input_problems(recipe: Recipe) -> Iterator[Problem]:
    """Everything that `check_inputs` refuses."""
    sound: dict[str, SetFacts] = {}
    for place, source in _sources(recipe):
        if is_remote(source.shards):
            continue
        try:
            found = open_source(place, source, STAGES[recipe.stage].shards)
            if source.pose is not None and not is_remote(source.pose):
                beside = source.model_copy(update={"shards": source.pose, "pose": None, "text": ""})
                poses = open_source(place, beside, ("features",), "pose")
                found = poses if isinstance(poses, Problem) else found
        except OSError as error:  # permissions, a network disk that is gone
            text = f"{place}.shards={source.shards} cannot be read: {error.filename}: {error.strerror}"
            found = Problem(f"{text}; correct its permissions or its mount", (f"{place}.shards",))
        if isinstance(found, Problem):
            yield found
        else:
            sound[place] = found
    if all(f"data.train.{number}" in sound for number in range(len(recipe.data.train))):
        yield from _text_problems(recipe)
        yield from _length_problems(recipe, sound)
    broken = set()
    for part in parts_of(recipe):
        if text := part_problem(part):
            broken.add(part.path)
            yield Problem(f"{part.name}={part.path} {text}", (part.name,))
    yield from fit_problems(recipe, sound, broken)


def _sources(recipe: Recipe) -> Iterator[tuple[str, SourceConfig]]:
    for name, sources in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        yield from ((f"{name}.{number}", source) for number, source in enumerate(sources))


# -- samples ---------------------------------------------------------------------------------------------------------
def _text_problems(recipe: Recipe) -> Iterator[Problem]:
    """``data.unique_texts`` needs as many distinct texts as a global batch has clips."""
    if not recipe.data.unique_texts or not STAGES[recipe.stage].contrasts or _other_texts(recipe):
        return
    texts = distinct_texts(recipe)
    if isinstance(texts, Problem):
        yield texts
    elif text := too_few_texts(recipe.train.global_batch, texts):
        yield Problem(text, ("train.global_batch", "data.unique_texts"))


def _other_texts(recipe: Recipe) -> bool:
    """Whether texts to learn are in text columns, which only the run opens."""
    return any(source.text for source in recipe.data.train)


def distinct_texts(recipe: Recipe) -> int | Problem:
    """Different texts among the samples to train on, counted no further than the global batch."""
    texts: set[int] = set()
    for number, source in enumerate(recipe.data.train):
        column = column_of(source, "text_hash")
        if isinstance(column, Problem):
            return Problem(f"data.train.{number}.{column.text}", (f"data.train.{number}.shards",))
        texts.update(column.unique().slice(0, recipe.train.global_batch).to_pylist())
        if len(texts) >= recipe.train.global_batch:
            break
    return len(texts)


def too_few_texts(global_batch: int, texts: int) -> str:
    """What is wrong with ``data.unique_texts`` for so few distinct texts; empty if nothing is."""
    if texts >= global_batch:
        return ""
    return (
        f"train.global_batch={global_batch} is more than the {texts} distinct texts of data.train, but "
        "data.unique_texts allows none twice in a batch; lower the batch, add data, or set data.unique_texts=false"
    )


def few_texts(recipe: Recipe) -> str:
    """A remark on a batch with more clips than there are distinct texts; empty if it has not, or nobody can tell.

    Equal texts are no negatives of each other, so the batch is only larger, not harder.
    """
    remote = any(is_remote(source.shards) for source in recipe.data.train)
    if recipe.data.unique_texts or not STAGES[recipe.stage].contrasts or remote or _other_texts(recipe):
        return ""
    texts = distinct_texts(recipe)
    if isinstance(texts, Problem) or texts >= recipe.train.global_batch:
        return ""
    return (
        f"train.global_batch={recipe.train.global_batch} is more than the {texts} distinct texts of data.train: equal "
        "texts are no negatives, so a larger batch adds none"
    )


def _length_problems(recipe: Recipe, sound: Mapping[str, SetFacts]) -> Iterator[Problem]:
    """``train.epochs`` must be at least one global batch, however the samples are grouped into items."""
    train, texts = recipe.train, "text" in STAGES[recipe.stage].shards
    if train.epochs is None or (recipe.data.epoch_samples and texts):  # which documents those are, the plan knows
        return
    items = 0.0
    for number, source in enumerate(recipe.data.train):
        most = source.weight if isinstance(source.weight, float) else max(weight for _, weight in source.weight)
        count = _most_items(recipe, source, sound[f"data.train.{number}"])
        items += max(1.0, most * count)
    items = recipe.data.epoch_samples or items
    if int((items + len(recipe.data.train)) * train.epochs) < train.global_batch:  # each source may round up
        text = (
            f"train.epochs={train.epochs:g} of at most {items:.0f} items is less than one global batch of "
            f"{train.global_batch}; lower train.global_batch or raise train.epochs"
        )
        yield Problem(text, ("train.epochs", "train.global_batch"))


def _most_items(recipe: Recipe, source: SourceConfig, facts: SetFacts) -> float:
    """Items of one pass at most: every clip by itself, every document cut into blocks of its own."""
    packs = facts.kind == "text"
    if source.corpus is None and not packs:
        return facts.splits[source.split]
    column = column_of(source, "tokens" if packs else "text_hash")
    if isinstance(column, Problem):  # the index was readable a moment ago
        return float("inf")
    import pyarrow.compute as pc

    return len(column) + (pc.sum(column).as_py() // recipe.data.block_tokens if packs else 0)


__all__ = ["check_inputs", "distinct_texts", "few_texts", "input_problems", "too_few_texts"]
