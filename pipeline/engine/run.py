"""What one rank does from start to exit code."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

from pipeline import dist
from pipeline.config.inputs import check_inputs
from pipeline.config.load import LoadedRecipe, load
from pipeline.config.resolve import resolve_loaded, write_resolved
from pipeline.engine.trainer import Trainer
from pipeline.errors import EXIT_BUG, EXIT_INTERRUPTED
from pipeline.stages.registry import STAGES

logger = logging.getLogger(__name__)


def setup_logging(ranks: dist.Ranks, run_dir: Path) -> None:
    """Rank 0 speaks on stderr; every rank keeps its own file in run_dir/logs."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    form = logging.Formatter(f"%(asctime)s rank={ranks.rank} %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    stream = logging.StreamHandler(sys.stderr)
    stream.setLevel(logging.INFO if ranks.is_main else logging.ERROR)
    file = logging.FileHandler(folder / f"rank-{ranks.rank}.log", encoding="utf-8")
    file.setFormatter(form)
    stream.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[stream, file], force=True)
    # DeepSpeed calls torch.distributed functions by their old names, several times per step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message=".gradient_checkpointing_enable. is deprecated")
    stores = ("fsspec", "s3fs", "botocore", "aiobotocore")
    for noisy in ("DeepSpeed", "deepspeed", "transformers", "torch", "filelock", "PIL", *stores):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def train(loaded: LoadedRecipe, sets: list[str]) -> int:
    """Resolve and train; returns the exit code. Ends the process group's work on every path."""
    ranks = dist.init()
    resolved = resolve_loaded(loaded, ranks.world_size, sets)
    recipe = resolved.recipe
    run_dir = Path(recipe.run_dir)
    setup_logging(ranks, run_dir)
    if ranks.is_main:
        write_resolved(resolved, run_dir)
    stage = STAGES[recipe.stage](recipe, ranks.rank, ranks.world_size, dist.device_for(ranks))
    trainer = Trainer(resolved, stage, ranks)
    trainer.prepare()
    state = trainer.fit()
    if ranks.is_main:
        logger.info("%s: %d steps, %s samples", recipe.name, state.step, f"{state.samples_seen:,}")
    dist.barrier()
    return trainer.exit_code


def main(recipe_path: str, sets: list[str]) -> int:
    """`train` with every failure turned into an exit code, one paragraph for users, and a note for the supervisor."""
    code, message, run_dir, failed = EXIT_BUG, "", None, False
    try:
        loaded = _read(recipe_path, sets)
        run_dir = Path(loaded.recipe.run_dir)
        check_inputs(loaded)
        code = train(loaded, sets)
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, "interrupted"
    except Exception as error:
        code, message, failed = getattr(error, "exit_code", EXIT_BUG), str(error), True
        if code == EXIT_BUG:
            message = traceback.format_exc()
    noted = _leave_exit_note(run_dir, code, message)
    if failed and not (noted and code != EXIT_BUG and dist.is_launched()):  # then the launcher tells it, once for all
        sys.stderr.write(f"error (rank {dist.ranks_from_environment().rank}): {message}\n")
    if message:
        # other ranks may sit in a collective; a polite shutdown would wait for them
        sys.stderr.flush()
        os._exit(code)
    dist.shutdown()
    return code


def _read(recipe_path: str, sets: list[str]) -> LoadedRecipe:
    """The recipe. What it remarks on settings is told by rank 0 alone, or has been told by the launcher."""
    quiet = dist.is_launched() or not dist.ranks_from_environment().is_main
    logging.basicConfig(level=logging.ERROR if quiet else logging.WARNING, format="%(message)s", force=True)
    return load(recipe_path, sets)


def _leave_exit_note(run_dir: Path | None, code: int, message: str) -> bool:
    """run_dir/logs/exit-rank-N.json: DeepSpeed's launcher turns every failure into 1, the supervisor reads these."""
    if run_dir is None:  # the recipe cannot be read
        return False
    rank = dist.ranks_from_environment().rank
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"exit-rank-{rank}.json").write_text(
        json.dumps({"rank": rank, "code": code, "error": message}), encoding="utf-8"
    )
    return True
