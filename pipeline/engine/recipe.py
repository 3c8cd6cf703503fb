"""The recipe of a run reaches its ranks through one file: one process resolves and writes it, every rank reads it, and
the ranks compare what they read before they build anything."""

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
    """A recipe as the user names it; its ranks were started without `slt launch run`."""

    recipe: str
    """A file, or the name of a built-in recipe."""
    sets: tuple[str, ...] = ()
    """Overrides, ``a.b=c``."""


@contextmanager
def file_of_run(source: RecipeFile | Unresolved, guard: Guard) -> Iterator[RecipeFile]:
    """The file that all ranks read: the launcher's, or one that rank 0 writes now. All ranks must enter.

    Args:
        source: what this rank was started with.
        guard: keeps other runs out of the run directory while rank 0 is inside.

    Raises:
        SltError: on every rank, if rank 0 cannot write it.
    """
    ranks = dist.ranks_from_environment()
    with ExitStack() as inside:
        if isinstance(source, Unresolved):
            yield _resolve_for_all(source, ranks, lambda run_dir: inside.enter_context(guard(run_dir)))
        else:
            if ranks.is_main:
                inside.enter_context(guard(source.run_dir))
            yield source


def _resolve_for_all(unresolved: Unresolved, ranks: dist.Ranks, enter: Callable[[Path], None]) -> RecipeFile:
    outcome: RecipeFile | SltError | None = None
    if ranks.is_main:
        try:
            outcome = _resolve(unresolved, ranks.world_size, enter)
        except Exception as error:
            if ranks.world_size == 1:
                raise
            # raised on this rank alone it would leave the others waiting
            outcome = error if isinstance(error, SltError) else SltError(traceback.format_exc())
    dist.init()
    outcome = dist.broadcast_object(outcome)
    if isinstance(outcome, SltError):
        raise outcome
    assert outcome is not None
    return outcome


def _resolve(unresolved: Unresolved, world_size: int, enter: Callable[[Path], None]) -> RecipeFile:
    loaded = load(unresolved.recipe, unresolved.sets)
    check_inputs(loaded)
    resolved = resolve_loaded(loaded, world_size, unresolved.sets)
    run_dir = Path(resolved.recipe.run_dir)
    enter(run_dir)
    return write_resolved(resolved, run_dir)


def read_on_all_ranks(file: RecipeFile, ranks: dist.Ranks) -> ResolvedRecipe:
    """The resolved recipe, after checking that every rank read the same bytes. All ranks must call.

    Raises:
        ClusterError: names the hosts and ranks that read other bytes than were written.
        RecipeError: it was resolved for another number of ranks, or a host lacks an input.
    """
    try:
        content = file.path.read_bytes()
        reading = f"reads sha256 {hashlib.sha256(content).hexdigest()}"
    except OSError as error:
        content, reading = b"", f"cannot read it: {error.strerror}"
    wrong = _gather_reports(reading, ranks, lambda text: text != f"reads sha256 {file.sha256}")
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
    """The recipe's inputs must exist on every host; one rank per host looks, all raise."""
    problem = ""
    if ranks.local_rank == 0:
        try:
            check_inputs(loaded)
        except (RecipeError, OSError) as error:
            problem = str(error)
    missing = _gather_reports(problem, ranks, bool)
    if missing:
        raise RecipeError(f"inputs are missing; every host must see them under the same paths\n{missing}")


def _gather_reports(mine: str, ranks: dist.Ranks, matters: Callable[[str], bool]) -> str:
    """The ranks' reports that matter, each once, with its ranks and hosts; empty if none does."""
    ranks_of_text: dict[str, dict[str, list[int]]] = {}
    for rank, (host, text) in enumerate(dist.gather_objects((socket.gethostname(), mine))):
        if matters(text):
            ranks_of_text.setdefault(text, {}).setdefault(host, []).append(rank)
    lines = []
    for text, hosts in ranks_of_text.items():
        who = "; ".join(f"rank {','.join(map(str, numbers))} on {host}" for host, numbers in hosts.items())
        lines.append(f"  {who}: {text}")
    return "\n".join(lines)


__all__ = ["Guard", "Unresolved", "file_of_run", "read_on_all_ranks"]
