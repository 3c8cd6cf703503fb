"""A rank, started like `launch/train.py`, that is asked to stop in the middle of the evaluation of step 2."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from launch.train import main
from pipeline.engine.observers.base import Wishes
from pipeline.engine.observers.evaluate import Evaluate
from pipeline.stages.base import Stage

evaluate, batches = Evaluate.evaluate, Stage.held_out
step = -1


def noting_the_step(observer: Evaluate, wishes: Wishes) -> dict[str, float]:
    global step
    step = observer.training.state.step
    return evaluate(observer, wishes)


def signalled_after_one(stage: Stage[Any], *given: Any) -> Iterator[Any]:
    for batch in batches(stage, *given):
        yield batch
        if stage.context.rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    Evaluate.evaluate, Stage.held_out = noting_the_step, signalled_after_one  # type: ignore[method-assign]
    sys.exit(main())
