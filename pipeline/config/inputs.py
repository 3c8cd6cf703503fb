"""A recipe's inputs must exist before any process starts: shard sets and their splits, exports, tokenizers.

Reads manifests, file names and single columns of an index; loads no model and asks no other machine. Inputs in an
object store or on the hub are left to the run, unless the hub cannot be reached at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.checks import is_remote
from pipeline.config.load import LoadedRecipe, problem_message
from pipeline.config.names import nearest
from pipeline.config.schema import Recipe, SourceConfig
from pipeline.config.source import Problem, shown_path
from pipeline.config.stages import STAGES
from pipeline.errors import RecipeError

if TYPE_CHECKING:
    import pyarrow as pa

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_WEIGHTS = ("*.safetensors", "*.bin")
_EXPORT = "export"


@dataclass(frozen=True, slots=True)
class _Part:
    """A setting that names a pretrained part."""

    name: str
    path: str | None
    weights: bool = True
    """Whether it is a model; otherwise a tokenizer."""
    hub: bool = True
    """Whether it may be a hub id."""


def check_inputs(loaded: LoadedRecipe) -> None:
    """Refuse a recipe whose inputs on this machine are missing or of the wrong kind.

    Raises:
        RecipeError: lists every problem with the line of its setting.
    """
    problems = list(input_problems(loaded.recipe))
    if problems:
        raise RecipeError(problem_message(shown_path(loaded.path), problems, loaded.origins))


def input_problems(recipe: Recipe) -> Iterator[Problem]:
    """Everything that `check_inputs` refuses."""
    sound = {}
    for name, sources in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        for number, source in enumerate(sources):
            place = f"{name}.{number}"
            kinds = STAGES[recipe.stage].shards
            problem = None if is_remote(source.shards) else _source_problem(place, source, kinds)
            if problem is not None:
                yield problem
            sound[place] = problem is None
    yield from _text_problems(recipe, sound)
    for part in _parts(recipe):
        if part.path is not None and (text := _part_problem(part, part.path)):
            yield Problem(f"{part.name}={part.path} {text}", (part.name,))


def missing_part(recipe: Recipe) -> str:
    """The first pretrained part that is not on this machine, and why; empty if all are, or the hub may have them."""
    for part in _parts(recipe):
        if part.path is not None and (text := _part_problem(part, part.path)):
            return f"{part.name}={part.path} {text}"
    return ""


# -- shard sets ------------------------------------------------------------------------------------------------------
def _folder(source: SourceConfig) -> Path:
    return Path(source.shards.removeprefix("file://"))


def _source_problem(place: str, source: SourceConfig, kinds: tuple[str, ...]) -> Problem | None:
    folder, name = _folder(source), f"{place}.shards"
    what = f"{name}={source.shards}"
    if not folder.is_dir():
        return Problem(f"{what} does not exist; build it with `slt shards build`, or correct the path", (name,))
    missing = [file for file in ("manifest.json", "index.parquet") if not (folder / file).is_file()]
    if missing:
        return Problem(f"{what} has no {missing[0]}: not a shard set, or its build did not finish", (name,))
    try:
        manifest: Any = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        kind, splits = str(manifest["kind"]), {str(split): int(n) for split, n in manifest["splits"].items()}
        shards = [str(shard["name"]) for shard in manifest["shards"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Problem(f"{what}: its manifest.json cannot be read ({error!r}); copy or build the set again", (name,))
    if kind not in kinds:
        return Problem(f"{what} holds {kind}, but this stage reads {' or '.join(kinds)}", (name,))
    present = {path.name for path in folder.iterdir()}
    if absent := [shard for shard in shards if shard not in present and not (folder / shard).is_file()]:
        text = f"{what}: {len(absent)} of its {len(shards)} shards are missing, first {absent[0]}; copy the set again"
        return Problem(text, (name,))
    if not splits.get(source.split):
        full = {split: count for split, count in sorted(splits.items()) if count}
        available = ", ".join(f"{split} ({count})" for split, count in full.items()) or "no samples at all"
        hint = nearest(source.split, full)
        return Problem(f"{place}.split={source.split}: {source.shards} has {available}{hint}", (f"{place}.split", name))
    return None if source.corpus is None else _corpus_problem(place, source)


def _corpus_problem(place: str, source: SourceConfig) -> Problem | None:
    import pyarrow.compute as pc

    table = _columns(source, ["split", "corpus"])
    if isinstance(table, Problem):
        return Problem(f"{place}.{table.text}", (f"{place}.shards",))
    known = pc.unique(table["corpus"]).to_pylist()
    if source.corpus in known:
        return None
    available = ", ".join(sorted(known))
    text = f"{place}.corpus={source.corpus}: split {source.split} of {source.shards} has {available}"
    return Problem(f"{text}{nearest(str(source.corpus), known)}", (f"{place}.corpus", f"{place}.shards"))


def _columns(source: SourceConfig, names: list[str]) -> pa.Table | Problem:
    """Columns of the index, for the source's split only."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(_folder(source) / "index.parquet", columns=sorted({"split", *names}))
    except (OSError, pa.ArrowException) as error:
        return Problem(f"shards={source.shards}: its index.parquet cannot be read ({error}); copy or build it again")
    return table.filter(pc.equal(table["split"], source.split))


def _text_problems(recipe: Recipe, sound: dict[str, bool]) -> Iterator[Problem]:
    """``data.unique_texts`` needs as many distinct texts as a global batch has clips."""
    sources = recipe.data.train
    if (
        not recipe.data.unique_texts
        or not STAGES[recipe.stage].contrasts
        or any(is_remote(source.shards) for source in sources)
    ):
        return
    if not all(sound[f"data.train.{number}"] for number in range(len(sources))):
        return
    texts: set[int] = set()
    for number, source in enumerate(sources):
        table = _columns(source, ["text_hash", "corpus"])
        if isinstance(table, Problem):
            yield Problem(f"data.train.{number}.{table.text}", (f"data.train.{number}.shards",))
            return
        if source.corpus is not None:
            import pyarrow.compute as pc

            table = table.filter(pc.equal(table["corpus"], source.corpus))
        texts.update(table["text_hash"].unique().slice(0, recipe.train.global_batch).to_pylist())
        if len(texts) >= recipe.train.global_batch:
            return
    if text := too_few_texts(recipe.train.global_batch, len(texts)):
        yield Problem(text, ("train.global_batch", "data.unique_texts"))


def too_few_texts(global_batch: int, texts: int) -> str:
    """What is wrong with ``data.unique_texts`` for so few distinct texts; empty if nothing is."""
    if texts >= global_batch:
        return ""
    return (
        f"train.global_batch={global_batch} is more than the {texts} distinct texts of data.train, but "
        "data.unique_texts allows none twice in a batch; lower the batch, add data, or set data.unique_texts=false"
    )


# -- pretrained parts ------------------------------------------------------------------------------------------------
def _parts(recipe: Recipe) -> Iterator[_Part]:
    model, needed = recipe.model, STAGES[recipe.stage].parts
    if model.llm is not None and "llm" in needed:
        yield _Part("model.llm.path", model.llm.path)
        tokenizer = model.llm.tokenizer or model.llm.path
        name = "model.llm.tokenizer" if model.llm.tokenizer else "model.llm.path"
        yield _Part(name, tokenizer, weights=False)
    if model.visual is not None and "visual" in needed:
        yield _Part("model.visual.path", model.visual.path, hub=False)
        if model.visual.backbone is not None:
            yield _Part("model.visual.backbone.path", model.visual.backbone.path)
    if model.text_encoder is not None and "text_encoder" in needed:
        yield _Part("model.text_encoder.path", model.text_encoder.path)
        yield _Part("model.text_encoder.path", model.text_encoder.path, weights=False)


def _part_problem(part: _Part, path: str) -> str:
    """What is wrong with a pretrained part; empty if nothing is, or only the hub can tell."""
    folder = Path(path)
    if not folder.is_dir():
        if part.hub and _HUB_ID.fullmatch(path):
            return _hub_problem(path)
        if folder.name == _EXPORT:
            return f"does not exist; it is written by `slt export {folder.parent}` once that stage has been trained"
        return "does not exist; name an existing folder" + (" or a hub id" if part.hub else "")
    if not part.weights:
        names = " or ".join(_TOKENIZER_FILES[:3])
        return "" if any((folder / name).is_file() for name in _TOKENIZER_FILES) else f"holds no tokenizer ({names})"
    if not (folder / "config.json").is_file():
        return "holds no config.json, so it is not a Hugging Face model"
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return f"holds no weights ({' or '.join(_WEIGHTS)}); copy or export it again"
    return ""


def _hub_problem(path: str) -> str:
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE) / f"models--{path.replace('/', '--')}" / "snapshots"
    if not constants.HF_HUB_OFFLINE or cached.is_dir():
        return ""
    return "is not a folder here, and the hub cannot be reached (HF_HUB_OFFLINE); download it, or correct the path"


__all__ = ["check_inputs", "input_problems", "missing_part", "too_few_texts"]
