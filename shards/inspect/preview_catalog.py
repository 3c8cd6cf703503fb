"""The preview page's view of a shard set: search, filter, sort and page through the index; one sample in full.

Arrow computes everything on columns in memory, so queries over a million samples take a fraction of a second.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.index import ShardSet
from shards.format.opening import media_type, open_set
from shards.inspect.stats import words
from shards.names import same_name
from shards.storage.store import open_folder
from shards.text import load_tokenizer, tokenise

SORTS = ("index", "length", "-length", "text", "-text", "id")
FILTERS = ("split", "corpus", "signer", "language")
MOST_PER_PAGE = 200
_SEARCHED = ("text", "gloss", "sample_id", "signer")
_LISTED = ("split", "corpus", "sample_id", "signer", "language", "text", "gloss", "frames", "fps", "duration_seconds")
_MOST_CHOICES = 200
_KEPT_QUERIES = 16
_MOST_SHOWN_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Query:
    """Which samples, in which order; values come from a URL and are checked here."""

    search: str = ""
    split: str = ""
    corpus: str = ""
    signer: str = ""
    language: str = ""
    sort: str = "index"

    def __post_init__(self) -> None:
        if self.sort not in SORTS:
            raise DataError(f"unknown order {self.sort!r}", where="sort", fix=f"known: {', '.join(SORTS)}")


class Catalog:
    """An opened shard set; safe to use from several threads.

    Args:
        location: folder or object-store URL.
        tokenizer: Hugging Face tokenizer folder for the token view; '' = none.

    Raises:
        DataError: the set or the tokenizer cannot be opened.
    """

    def __init__(self, location: str | Path, tokenizer: str = "") -> None:
        self.location = str(location)
        self.folder = open_folder(location)
        self.shard_set: ShardSet = open_set(self.folder)
        self.table = self.shard_set.table
        self.kind = self.shard_set.manifest.kind
        self.tokenizer_name = tokenizer
        self._tokenizer = load_tokenizer(tokenizer) if tokenizer else None
        self._recent: OrderedDict[Query, NDArray[np.int64]] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()  # fast tokenizers keep state in the object

    def summary(self) -> dict[str, Any]:
        """Figures of the set, and the choices of every filter with their numbers of samples, commonest first."""
        manifest = self.shard_set.manifest
        return {
            "location": self.location,
            "kind": self.kind,
            "fingerprint": manifest.fingerprint,
            "samples": self.table.num_rows,
            "shards": len(manifest.shards),
            "bytes": sum(shard["size"] for shard in manifest.shards),
            "seconds": pc.sum(self.table["duration_seconds"]).as_py() or 0.0,
            "tokens": pc.sum(self.table["tokens"]).as_py() or 0,
            "tokenizer": self.tokenizer_name,
            "choices": {name: self._choices(name) for name in FILTERS},
        }

    def _choices(self, name: str) -> dict[str, Any]:
        counted = self.table.group_by([name]).aggregate([([], "count_all")]).to_pylist()
        counted = sorted((row for row in counted if row[name]), key=lambda row: (-row["count_all"], row[name]))
        return {
            "all": len(counted),
            "common": [{"value": row[name], "samples": row["count_all"]} for row in counted[:_MOST_CHOICES]],
        }

    def page(self, query: Query, page: int, per_page: int) -> dict[str, Any]:
        """One page of matching samples; ``page`` counts from 1 and is clamped to the pages that exist."""
        per_page = min(max(per_page, 1), MOST_PER_PAGE)
        matching = self._find(query)
        pages = max(1, -(-len(matching) // per_page))
        page = min(max(page, 1), pages)
        numbers = matching[(page - 1) * per_page : page * per_page]
        rows = self.table.select([*_LISTED, "tokens", "width", "height"]).take(pa.array(numbers)).to_pylist()
        for number, row in zip(numbers.tolist(), rows, strict=True):
            row["number"] = number
        return {"matching": len(matching), "page": page, "pages": pages, "per_page": per_page, "rows": rows}

    def _find(self, query: Query) -> NDArray[np.int64]:
        """Row numbers in the query's order; the last few results are kept, because paging repeats the query."""
        with self._lock:
            if query in self._recent:
                self._recent.move_to_end(query)
                return self._recent[query]
        matching = self._compute(query)
        with self._lock:
            self._recent[query] = matching
            while len(self._recent) > _KEPT_QUERIES:
                self._recent.popitem(last=False)
        return matching

    def _compute(self, query: Query) -> NDArray[np.int64]:
        mask = None
        for name in FILTERS:
            if value := getattr(query, name):
                mask = _and(mask, pc.equal(self.table[name], value))
        for term in query.search.split():  # every word must occur, in any of the columns
            hits = [self._holds(name, term) for name in _SEARCHED]
            mask = _and(mask, pc.or_(pc.or_(hits[0], hits[1]), pc.or_(hits[2], hits[3])))
        numbers = np.arange(self.table.num_rows) if mask is None else np.flatnonzero(mask.to_numpy())
        if query.sort == "index":
            return numbers
        keys = self._sort_keys(query.sort.removeprefix("-"), numbers)
        return numbers[np.argsort(-keys if query.sort.startswith("-") else keys, kind="stable")]

    def _holds(self, name: str, term: str) -> Any:
        """Whether a column contains a term, in any spelling of its characters."""
        values = self.table[name]
        if not term.isascii():
            values, term = pc.utf8_normalize(values, form="NFC"), same_name(term)
        return pc.match_substring(values, term, ignore_case=True)

    def _sort_keys(self, name: str, numbers: NDArray[np.int64]) -> NDArray[Any]:
        if name == "id":
            part = self.table["sample_id"].take(pa.array(numbers))
            return np.argsort(pc.array_sort_indices(part.combine_chunks()).to_numpy().astype(np.int64), kind="stable")
        if name == "text":
            lengths = pc.utf8_length(self.table["text"])
        else:
            lengths = self.table["tokens" if self.kind == "text" else "duration_seconds"]
        keys: NDArray[Any] = lengths.to_numpy()[numbers]
        return keys

    def sample(self, number: int) -> dict[str, Any]:
        """Everything about one sample: index row, json member, checksums, tokens. DataError if it does not exist."""
        row = self.row(number)
        detail = {"number": number, "row": row, "media_type": "", "meta": None}
        payload = self.folder.read_range(row["shard"], row["offset"], row["size"])
        detail["checksum_ok"] = zlib.crc32(payload) == row["crc32"]
        if self.kind == "video":
            detail["media_type"] = media_type(payload[:64])
        if row["meta_offset"] >= 0:
            meta = self.folder.read_range(row["shard"], row["meta_offset"], row["meta_size"])
            detail["checksum_ok"] = detail["checksum_ok"] and zlib.crc32(meta) == row["meta_crc32"]
            detail["meta"] = _parsed(meta)
        detail["tokens"] = self._tokens(row, payload)
        detail["words"] = len(words(row["text"], row["language"]))
        return detail

    def row(self, number: int) -> dict[str, Any]:
        """The index row of a sample. Raises DataError for a number outside the set."""
        if not 0 <= number < self.table.num_rows:
            what = f"sample {number} of a set of {self.table.num_rows}"
            raise DataError(f"no such sample: {what}", where=self.location, fix="ask for a number from the list")
        (row,) = self.table.slice(number, 1).to_pylist()
        return dict(row)

    def _tokens(self, row: dict[str, Any], payload: bytes) -> dict[str, Any] | None:
        """The stored ids of a document, or the tokenizer's ids for the text; with their strings if known."""
        stored = self.kind == "text"
        if stored:
            width = row["size"] // max(1, row["tokens"])
            ids = np.frombuffer(payload, f"<u{width}").tolist() if width in (2, 4) else []
        elif self._tokenizer is None:
            return None
        else:
            with self._tokenizer_lock:
                ids = tokenise([row["text"]], self._tokenizer)[0].tolist()
        shown = ids[:_MOST_SHOWN_TOKENS]
        return {"stored": stored, "total": len(ids), "tokens": [self._token(number) for number in shown]}

    def _token(self, number: int) -> dict[str, Any]:
        """An id, the piece of text it stands for, and whether it is special or unknown to the tokenizer."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return {"id": number, "piece": None, "kind": "plain"}
        with self._tokenizer_lock:
            if number >= len(tokenizer):
                return {"id": number, "piece": None, "kind": "outside"}
            piece = tokenizer.decode([number])
            name = tokenizer.convert_ids_to_tokens(number)
        if number == tokenizer.unk_token_id:
            return {"id": number, "piece": name, "kind": "unknown"}
        if number in tokenizer.all_special_ids:
            return {"id": number, "piece": name, "kind": "special"}
        return {"id": number, "piece": piece if piece.strip() and "\ufffd" not in piece else name, "kind": "plain"}

    def media(self, number: int) -> tuple[dict[str, Any], str]:
        """Index row and media type of a video's payload. Raises DataError when the sample is no video."""
        row = self.row(number)
        if self.kind != "video":
            raise DataError(f"sample {number} is no video", where=self.location, fix="play samples of a video set")
        return row, media_type(self.folder.read_range(row["shard"], row["offset"], min(64, row["size"])))


def _and(mask: Any, more: Any) -> Any:
    return more if mask is None else pc.and_(mask, more)


def _parsed(meta: bytes) -> Any:
    """The value of a json member; the text of any other member (``.txt``)."""
    text = meta.decode("utf-8", "replace")
    try:
        return json.loads(text)
    except ValueError:
        return text
