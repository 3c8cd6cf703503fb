"""Real lengths for made-up data: how many PHOENIX-2014T and How2Sign training texts have how many tokens, and
PHOENIX-2014T clips how many frames (25 per second). Counts only, in `lengths.json`, written by

    python -m benchmarks.gpu.lengths FOLDER      # a folder with the corpora, as packing_utilisation.py reads them
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

FILE = Path(__file__).with_name("lengths.json")


def draw(name: str, count: int, seed: int = 0) -> list[int]:
    """``count`` lengths with the corpus' frequencies; ``name``: `phoenix_tokens`, `how2sign_tokens` or
    `phoenix_frames`."""
    counts = json.loads(FILE.read_text(encoding="utf-8"))[name]
    lengths = [int(length) for length in counts]
    return random.Random(seed).choices(lengths, weights=list(counts.values()), k=count)


def write(folder: Path) -> None:
    """Count the corpora's lengths."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from packing_utilisation import how2sign, phoenix, token_lengths
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "models/multilingual-e5-small-pruned/tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    frames = [
        int(line.split("\t")[1])
        for line in (folder / "phoenix2014t/num_frames.train.tsv").read_text(encoding="utf-8").splitlines()
    ]
    counts = {
        "phoenix_tokens": Counter(token_lengths(tokenizer, phoenix(folder)).tolist()),
        "how2sign_tokens": Counter(token_lengths(tokenizer, how2sign(folder)).tolist()),
        "phoenix_frames": Counter(frames),
    }
    rows = [f'"{name}": {json.dumps({str(n): found[n] for n in sorted(found)})}' for name, found in counts.items()]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
