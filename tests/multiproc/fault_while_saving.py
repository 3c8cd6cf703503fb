"""A rank, started like `launch/train.py`, that meets SLT_TEST_FAULT on rank 1 while it writes the checkpoint of step 4.

The write begins only after more steps.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from launch.train import main
from pipeline.engine.saving import files
from pipeline.engine.saving.files import Parts, RankFiles

write = RankFiles.write


def faulty(rank_files: RankFiles) -> Parts:
    fault = os.environ["SLT_TEST_FAULT"]
    if rank_files.rank == 1 and rank_files.folder.name.endswith("step-000004"):
        time.sleep(0.3)  # the next step is under way
        if fault == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
        elif fault == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        elif fault == "kill":
            write(rank_files)
            os.kill(os.getpid(), signal.SIGKILL)
    return write(rank_files)


if __name__ == "__main__":
    files.RankFiles.write = faulty  # type: ignore[method-assign]
    sys.exit(main())
