"""How full the packs of continued pretraining are, on the length distributions of real sign-language texts.

    python benchmarks/packing_utilisation.py [--quick] [--out FILE] [--data FOLDER]

Texts are tokenised with a real tokenizer and packed by ``shards.order.packing`` in seeded epoch order. Beside it stands
the best any packing could do, and in the receipt the plainest one, which fills a block until a document does not fit.
Needs the shared corpora (SLT_SHARED_DATA).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import os
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from receipt import ROOT, Claim, write_receipt
from tokenizers import Tokenizer

from shards.order import packing
from shards.order import shuffle as order

TARGET_UTILISATION = 0.99
TARGET_MICROSECONDS = 1.0


class _PlainUnpickler(pickle.Unpickler):
    """Containers, strings and numbers only: a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refusing {module}.{name}: only plain containers are read")


def phoenix(folder: Path) -> list[str]:
    """German weather reports, PHOENIX-2014-T train."""
    with (folder / "phoenix2014t/PHOENIX-2014-T.train.corpus.csv").open(encoding="utf-8", newline="") as handle:
        return [row["translation"] for row in csv.DictReader(handle, delimiter="|", quoting=csv.QUOTE_NONE)]


def nzsl(folder: Path) -> list[str]:
    """English translations of New Zealand Sign Language examples."""
    with (folder / "nzsl/nzsl_usage.tsv").open(encoding="utf-8", newline="") as handle:
        rows = csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row["translation"] for row in rows if row["translation"]]


def how2sign(folder: Path) -> list[str]:
    """English sentences of How2Sign train."""
    data = gzip.decompress((folder / "how2sign/labels.train").read_bytes())
    return [row["text"] for row in _PlainUnpickler(io.BytesIO(data)).load().values()]


def survey(folder: Path) -> list[str]:
    """Paragraphs of a survey of sign language processing: few, and of very uneven length."""
    text = (folder / "slp_book/index.md").read_text(encoding="utf-8")
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


CORPORA: dict[str, Callable[[Path], list[str]]] = {
    "PHOENIX-2014-T": phoenix, "NZSL": nzsl, "How2Sign": how2sign, "survey paragraphs": survey,
}  # fmt: skip


def token_lengths(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Tokens per text with its special tokens, as the text shards store them."""
    return np.asarray([len(encoding.ids) for encoding in tokenizer.encode_batch(texts)], dtype=np.int64)


def greedy_blocks(lengths: np.ndarray, block: int) -> int:
    """Blocks used when each is filled until the next piece does not fit."""
    blocks, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            blocks, room = blocks + 1, block
        room -= length
    return blocks


def compare(name: str, lengths: np.ndarray, block: int, epochs: int) -> tuple[Claim, float]:
    """Utilisation over some epochs, and the microseconds a document took to plan."""
    ours, peer, seconds = [], [], []
    for epoch in range(epochs):
        samples = order.Stream(len(lengths), 0, 0).take(epoch * len(lengths), (epoch + 1) * len(lengths))
        begin = time.process_time()
        items = packing.pack(samples, lengths[samples], block)
        seconds.append((time.process_time() - begin) / len(lengths) * 1e6)
        ours.append(lengths.sum() / (len(items) * block))
        pieces = packing.cut_documents(samples, lengths[samples], block)["length"]
        peer.append(lengths.sum() / (greedy_blocks(pieces, block) * block))
    mine, theirs = statistics.median(ours), statistics.median(peer)
    # The last pack of an epoch cannot be full; a small corpus has few packs to spread that over.
    limit = lengths.sum() / (-(-int(lengths.sum()) // block) * block)
    detail = {"documents": len(lengths), "tokens": int(lengths.sum()), "all": ours, "sequential_greedy": float(theirs)}
    claim = Claim(
        f"packs of {block}: {name} (peer: fewest blocks possible)",
        float(mine),
        float(limit),
        None,
        TARGET_UTILISATION,
        "utilisation",
        epochs,
        detail=detail,
    )
    return claim, statistics.median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one block size, one epoch")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    default = Path(os.environ.get("SLT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of the shared corpora")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"no real texts: {options.data} does not exist; set SLT_SHARED_DATA or --data")
    tokenizer = Tokenizer.from_file(str(options.data / "models/multilingual-e5-small-pruned/tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = {name: token_lengths(tokenizer, load(options.data)) for name, load in CORPORA.items()}
    lengths["all together"] = np.concatenate(list(lengths.values()))
    rows, cost = [], 0.0
    for block in (1024,) if options.quick else (512, 1024, 2048, 4096):
        for name, found in lengths.items():
            claim, cost = compare(name, found, block, 1 if options.quick else 5)
            rows.append(claim)
    many = np.tile(lengths["all together"], -(-200_000 // len(lengths["all together"])))[:200_000]
    _, cost = compare("all together", many, 1024, 3)
    rows.append(
        Claim("planning packs, 200k documents", cost, None, None, TARGET_MICROSECONDS, "us per document", 3, False)
    )
    write_receipt(rows, options.out, ["numpy", "tokenizers"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
