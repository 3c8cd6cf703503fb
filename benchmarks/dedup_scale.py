"""Duplicate texts: documents per second, bytes per document and recall of planted duplicates, against datasketch.

    python benchmarks/dedup_scale.py [--quick] [--out FILE]

Documents are random words with a natural frequency curve. One in ten is planted: an exact copy, a copy with a word
changed (similarity above the threshold), or one with many words changed (below it). The peer does the same work as its
documentation shows it for many sets: ``MinHash.bulk`` of the same n-grams, MinHashLSH with query and insert. It runs on
fewer documents, since it is slower; its speed per document does not depend on their number. The peer is installed by
``pip install datasketch``.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from receipt import Claim, write_receipt

from shards.filter.dedup import Signatures, first_of_equals, near_duplicates, text_hashes
from shards.text import fold_text

THRESHOLD, WORDS, PERMUTATIONS = 0.8, 5, 128
LENGTH = 100
BLOCK = 512
EXACT, NEAR, FAR = 1, 2, 3


@dataclass(frozen=True)
class Documents:
    """Made texts; ``planted`` [D] says what a document is: 0 new, else a copy of an earlier one of that kind."""

    texts: list[str]
    planted: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def blocks(self) -> Iterator[list[str]]:
        for start in range(0, len(self.texts), BLOCK):
            yield self.texts[start : start + BLOCK]


def make(number: int, seed: int = 0) -> Documents:
    """``number`` documents of 100 words; the copies follow their originals at random distances."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 11, 50_000)]
    words = np.minimum(rng.zipf(1.2, (number, LENGTH)), 50_000).astype(np.int32) - 1
    planted = np.zeros(number, dtype=np.int8)
    later = rng.choice(np.arange(number // 2, number), number // 10, replace=False)
    for kind, rows in zip((EXACT, NEAR, FAR), np.array_split(later, 3), strict=True):
        originals = rng.choice(number // 2, len(rows), replace=False)
        words[rows], planted[rows] = words[originals], kind
        if kind == EXACT:
            continue
        # One changed word takes 5 of 96 n-grams out of both: similarity .90; twelve apart leave .23.
        for place in np.linspace(6, LENGTH - 6, 1 if kind == NEAR else 12).astype(int):
            words[rows, place] = rng.integers(0, 50_000, len(rows))
    texts = [" ".join([vocabulary[word] for word in row.tolist()]) for row in words]
    return Documents(texts, planted)


def exact(documents: Documents) -> tuple[np.ndarray, int]:
    """(bool [D] duplicates, bytes kept)."""
    hashes = np.concatenate([text_hashes([fold_text(text) for text in block]) for block in documents.blocks()])
    return ~first_of_equals(hashes), hashes.nbytes


def near(documents: Documents) -> tuple[np.ndarray, int]:
    """(bool [D] near duplicates, bytes kept)."""
    signatures = Signatures(WORDS, PERMUTATIONS)
    for block in documents.blocks():
        signatures.append([fold_text(text) for text in block])
    stored = signatures.array()
    return near_duplicates(stored, np.arange(len(stored)), THRESHOLD), stored.nbytes


def peer(documents: Documents) -> tuple[np.ndarray, int]:
    """The same with datasketch: a document that a query finds is a near duplicate, any other is inserted."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    gone = np.zeros(len(documents), dtype=bool)
    number = 0
    for block in documents.blocks():
        words = [fold_text(text).split() for text in block]
        grams = [[" ".join(w[at : at + WORDS]).encode() for at in range(len(w) - WORDS + 1)] for w in words]
        for sketch in MinHash.bulk(grams, num_perm=PERMUTATIONS):
            if index.query(sketch):
                gone[number] = True
            else:
                index.insert(number, sketch)
            number += 1
    return gone, 0


def measured(run: Callable[[Documents], tuple[np.ndarray, int]], documents: Documents) -> dict[str, Any]:
    """Speed, bytes per document, recall of planted duplicates, part of the others that went by mistake."""
    started = time.process_time()
    gone, size = run(documents)
    seconds = time.process_time() - started
    kinds = (EXACT,) if run is exact else (EXACT, NEAR)
    wanted = np.isin(documents.planted, kinds)
    return {
        "documents": len(documents),
        "documents_per_second": len(documents) / seconds,
        "bytes_per_document": size / len(documents),
        "recall": float(gone[wanted].mean()),
        "false_positives": float(gone[~wanted].mean()),
    }


def peer_memory(number: int) -> float:
    """Bytes of Python objects per document that the peer keeps."""
    tracemalloc.start()
    from datasketch import MinHash, MinHashLSH

    before = tracemalloc.get_traced_memory()[0]
    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    for document in range(number):
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update(str(document).encode())
        index.insert(document, sketch)
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return kept / number


def claims(sizes: list[int], peer_documents: int) -> list[Claim]:
    """All measurements of this run."""
    made = make(peer_documents)
    theirs, ours_small = measured(peer, made), measured(near, made)
    rows = []
    for size in sizes:
        documents = make(size)
        ours, equal = measured(near, documents), measured(exact, documents)
        speed = ours["documents_per_second"]
        detail = {"ours": ours, "exact": equal, "peer": theirs, "ours_on_the_peers_documents": ours_small}
        rows.append(
            Claim(
                f"near duplicates of {size:,} documents of {LENGTH} words", speed, theirs["documents_per_second"],
                speed / theirs["documents_per_second"], 5.0, "documents/CPU-s", 1, detail=detail,
            )
        )  # fmt: skip
        rows.append(
            Claim(
                f"exact duplicates of {size:,} documents", equal["documents_per_second"], None, None, 40_000,
                "documents/CPU-s", 1, detail=equal,
            )
        )  # fmt: skip
        rows.append(
            Claim("planted near duplicates found", ours["recall"], theirs["recall"], None, 0.98, "part", 1, detail=ours)
        )
        rows.append(
            Claim(
                "other documents taken for near duplicates", ours["false_positives"], theirs["false_positives"], None,
                0.001, "part", 1, higher_is_better=False, detail=ours,
            )
        )  # fmt: skip
    kept = peer_memory(2000)
    mine = ours_small["bytes_per_document"]
    rows.append(Claim("memory of the signatures", mine, kept, kept / mine, 8.0, "bytes/document", 1, False))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer documents")
    parser.add_argument("--out", type=Path, help="JSON lines; default: print only")
    options = parser.parse_args()
    try:
        import datasketch  # noqa: F401
    except ImportError:
        sys.exit("the peer is missing: pip install datasketch")
    sizes, peer_documents = ([20_000], 3_000) if options.quick else ([100_000, 1_000_000], 20_000)
    rows = claims(sizes, peer_documents)
    write_receipt(rows, options.out, ("numpy", "datasketch"))
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
