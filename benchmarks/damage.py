"""What damaged tars do to a training run: plain webdataset and this project over the same files.

    python benchmarks/damage.py [--quick] [--out FILE]

For every damage one shard of a set of small clips is changed, and both sides read one epoch. Counted is what a run
would not notice: samples that are missing without an error, and samples delivered with wrong bytes. webdataset runs
twice: as it is (an error ends the epoch) and with ``warn_and_continue``. Ours must name every damaged sample, replace
it, and deliver no wrong byte.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import warnings
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset as wds
from receipt import ROOT, Claim, write_receipt

sys.path.insert(0, str(ROOT))

from loader_data import make_clips

from shards.format.index import read_index
from shards.load.loader import LoaderOptions, StepLoader
from shards.load.reader import Reader
from shards.order.items import Elements
from shards.order.plan import Plan, PlanOptions, Source
from tests.unit.shards.damages import DAMAGES, damage

VICTIM = "train-000001.tar"


def fetch(reader: Reader, item: Elements) -> list[tuple[int, int]]:
    """Number and checksums of what is delivered; reading the annotation checks it."""
    found = []
    for sample in item["sample"].tolist():
        assert reader.meta(sample)
        found.append(
            (sample, zlib.crc32(reader.payload(sample)) ^ int(reader.plan.samples.columns["meta_crc32"][sample]))
        )
    return found


def collate(items: list[list[Any]]) -> dict[str, Any]:
    return {"items": [sample for item in items for sample in item]}


def read_ours(folder: Path, right: dict[str, int], first: dict[int, str]) -> dict[str, Any]:
    """One epoch: what was delivered wrong, what was named and replaced."""
    plan = Plan([Source(read_index(folder))], PlanOptions("clip"))
    batch = 20
    loader = StepLoader(plan, fetch, collate, LoaderOptions(0, 1, batch, batch))
    delivered = []
    for step in islice(loader, len(right) // batch):
        delivered += step.micro_batches[0]["items"]
    seen = {first[sample] for sample, _ in delivered}
    wrong = sum(right[first[sample]] != crc for sample, crc in delivered)
    named = {first[sample] for sample in loader.bad_samples}
    return {"silently_lost": len(set(right) - seen - named), "wrong": wrong, "named": len(named), "error": ""}


def read_webdataset(folder: Path, names: list[str], right: dict[str, int], handler: Any) -> dict[str, Any]:
    """One epoch of the tars as they are."""
    delivered: dict[str, int] = {}
    error = ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            for sample in wds.WebDataset([str(folder / name) for name in names], shardshuffle=False, handler=handler):
                if "mp4" in sample and "json" in sample:
                    delivered[sample["__key__"]] = zlib.crc32(sample["mp4"]) ^ zlib.crc32(sample["json"])
        except Exception as problem:  # whatever ends its epoch is the result
            error = f"{type(problem).__name__}: {problem}"[:200]
    told = [
        str(one.message)[:200] for one in said if not issubclass(one.category, ResourceWarning | DeprecationWarning)
    ]
    lost = len(set(right) - set(delivered))
    wrong = sum(right.get(key) != crc for key, crc in delivered.items())
    return {
        "silently_lost": 0 if error or told else lost,
        "lost": lost,
        "wrong": wrong,
        "error": error,
        "told": told[:2],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shards instead of ten")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    logging.getLogger("shards").setLevel(logging.ERROR)  # one line per damaged sample
    rows = []
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        clean = make_clips(Path(scratch) / "clean", 600 if options.quick else 2000)
        shard_set = read_index(clean)
        right = {row.key: row.crc32 ^ row.meta_crc32 for row in shard_set.rows()}
        first = {number: row.key for number, row in enumerate(shard_set.rows())}
        names = sorted(path.name for path in clean.glob("*.tar"))
        for name in DAMAGES:
            folder = Path(shutil.copytree(clean, Path(scratch) / "damaged"))
            damage(name, folder / VICTIM)
            ours = read_ours(folder, right, first)
            plain = read_webdataset(folder, names, right, wds.reraise_exception)
            lenient = read_webdataset(folder, names, right, wds.warn_and_continue)
            shutil.rmtree(folder)
            unnoticed = ours["silently_lost"] + ours["wrong"]
            theirs = plain["silently_lost"] + plain["wrong"]
            label = f"{name.replace('_', ' ')}: samples lost or wrong without a word"
            detail = {"ours": ours, "webdataset": plain, "webdataset warn_and_continue": lenient, "samples": len(right)}
            rows.append(Claim(label, unnoticed, theirs, None, 0, "samples", 1, False, detail))
    write_receipt(rows, options.out, ["webdataset"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
