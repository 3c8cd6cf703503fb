"""The recipe of a run reaches its ranks through one file: one process resolves and writes it, every rank reads it, and
the ranks compare what they have read before anything is built from it."""

from __future__ import annotations

import hashlib
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline import dist
from pipeline.config.inputs import check_inputs
from pipeline.config.load import LoadedRecipe, load
from pipeline.config.recipe_file import RecipeFile, write_resolved
from pipeline.config.resolve import ResolvedRecipe, resolve_loaded
from pipeline.errors import ClusterError, RecipeError, SltError

Guard = Callable[[Path], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A recipe as a user names it; the ranks were started without `slt launch run`."""

    recipe: str
    """A file, or the name of one of ours."""
    sets: tuple[str, ...] = ()
    """Overrides, ``a.b=c``."""


@contextmanager
def file_of_run(given: RecipeFile | Unresolved, guard: Guard) -> Iterator[RecipeFile]:
    """The file that all ranks read: the launcher's, or one that rank 0 writes now. All ranks must enter.

    Args:
        given: what this rank was started with.
        guard: keeps other runs out of the run directory while rank 0 is inside.

    Raises:
        SltError: on every rank, what kept rank 0 from writing it.
    """
    ranks = dist.ranks_from_environment()
    with ExitStack() as inside:
        if isinstance(given, Unresolved):
            yield _resolve_for_all(given, ranks, lambda run_dir: inside.enter_context(guard(run_dir)))
        else:
            if ranks.is_main:
                inside.enter_context(guard(given.run_dir))
            yield given


def _resolve_for_all(given: Unresolved, ranks: dist.Ranks, enter: Callable[[Path], None]) -> RecipeFile:
    told: RecipeFile | SltError | None = None
    if ranks.is_main:
        try:
            told = _resolve(given, ranks.world_size, enter)
        except Exception as error:
            if ranks.world_size == 1:
                raise
            # raised here alone it would leave the others waiting for this rank
            told = error if isinstance(error, SltError) else SltError(traceback.format_exc())
    dist.init()
    told = dist.broadcast_object(told)
    if isinstance(told, SltError):
        raise told
    assert told is not None
    return told


def _resolve(given: Unresolved, world_size: int, enter: Callable[[Path], None]) -> RecipeFile:
    loaded = load(given.recipe, given.sets)
    check_inputs(loaded)
    resolved = resolve_loaded(loaded, world_size, given.sets)
    run_dir = Path(resolved.recipe.run_dir)
    enter(run_dir)
    return write_resolved(resolved, run_dir)


def read_alike(file: RecipeFile, ranks: dist.Ranks) -> ResolvedRecipe:
    """The resolved recipe, of which every rank has read the same bytes. All ranks must call.

    Raises:
        ClusterError: names the hosts and ranks that read something else than was written.
        RecipeError: it was resolved for another number of ranks, or a host lacks what it reads.
    """
    try:
        content = file.path.read_bytes()
        found = f"reads sha256 {hashlib.sha256(content).hexdigest()}"
    except OSError as error:
        content, found = b"", f"cannot read it: {error.strerror}"
    wrong = _told(found, ranks, lambda told: told != f"reads sha256 {file.sha256}")
    if wrong:
        raise ClusterError(
            f"{file.path} was written with sha256 {file.sha256}, but\n{wrong}\n"
            "run_dir must be on storage that all hosts share under the same path, and no other run may use it; nothing "
            "was trained. Correct that, then start again"
        )
    resolved = ResolvedRecipe.from_yaml(content.decode(), str(file.path))
    if resolved.world_size != ranks.world_size:
        raise RecipeError(
            f"{file.path} is resolved for {resolved.world_size} ranks, but {ranks.world_size} were started; start them "
            "with `slt launch run`, which resolves the recipe for their number"
        )
    _check_inputs(LoadedRecipe(resolved.recipe, file.path), ranks)
    return resolved


def _check_inputs(loaded: LoadedRecipe, ranks: dist.Ranks) -> None:
    """What the recipe reads must be there on every host; one rank of each looks, all raise."""
    problem = ""
    if ranks.local_rank == 0:
        try:
            check_inputs(loaded)
        except (RecipeError, OSError) as error:
            problem = str(error)
    missing = _told(problem, ranks, bool)
    if missing:
        raise RecipeError(f"inputs are missing; every host must see them under the same paths\n{missing}")


def _told(mine: str, ranks: dist.Ranks, matters: Callable[[str], bool]) -> str:
    """What matters of that which the ranks say, each text once with the ranks that say it; empty where nothing does."""
    speakers: dict[str, dict[str, list[int]]] = {}
    for rank, (host, text) in enumerate(dist.gather_objects((socket.gethostname(), mine))):
        if matters(text):
            speakers.setdefault(text, {}).setdefault(host, []).append(rank)
    lines = []
    for text, hosts in speakers.items():
        who = "; ".join(f"rank {','.join(map(str, numbers))} on {host}" for host, numbers in hosts.items())
        lines.append(f"  {who}: {text}")
    return "\n".join(lines)


__all__ = ["Guard", "Unresolved", "file_of_run", "read_alike"]
