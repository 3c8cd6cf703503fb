"""What a rank of `tests.ranks.run_ranks` runs: ``rank_call.py FILE``, with the pickled call in the file."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from tests.ranks import child

    child(*pickle.loads(Path(sys.argv[1]).read_bytes()))
